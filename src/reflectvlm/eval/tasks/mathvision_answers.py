r"""How MATH-Vision takes the answer out of a reply, and when it equals the gold answer.

Left out: what Python's `eval` does beyond arithmetic; see `mathvision.py`.
"""

from __future__ import annotations

import re

from reflectvlm.rewards.maths import Equal

_LEADS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_LONGEST = 2000
"""Characters of an answer that is cleaned and compared; the gold answers have some dozens."""
_LONGEST_FORMULA = 300
_DEEPEST = 8
"""Brackets in brackets: the grammar takes twice as long for every further pair or two."""
# What may be in a formula that has a value: any other word makes the official script give up.
_COMMAND = re.compile(
    r"\\(?:frac|sqrt|pi|cdot|times|div|(?:arc)?(?:sin|cos|tan)|log|ln|exp|circ|degree)(?![a-z])|\\[ ,;!:]"
)
_WORD = re.compile(r"[^\W\d_]|\\|_")
_PLAIN = re.compile(r"[+-]?(?:[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})")
# 9^{9^{9}}, 9**9**9, 9^{99999}, 99999!: seconds or gigabytes each, and no answer of these problems.
_TOWER = re.compile(
    r"(?:\^|\*\*)[ {(]*-?[0-9.]+[ })]*(?:\^|\*\*)|\^\{[^{}]*(?:\^|\*\*)"
    r"|(?:\^|\*\*)[ {(]*-?[0-9.]{5,}|[0-9]{4,}[ )}]*!|!!"
)
_SLASH = re.compile(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)")
_DROPPED = (
    " ", r"\,", "\n", r"\text", r"\mbox", r"\left", r"\right", r"^{\circ}", r"^\circ", "{m}^3", "m^3",
    "{units}", "units", "{km}", "km",
)  # fmt: skip


def answer_of(text: str) -> str:
    """The answer in a reply, cleaned and in lower case."""
    answer = _cut(_number_behind_is(_lettered(text.strip())))
    answer = _cleaned(_boxed(answer.lower()))
    for letter in "abcde":
        answer = answer.replace(f"({letter})", letter)
    for letter in "abcde":
        answer = answer.replace(f"{{{letter}}}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def _lettered(text: str) -> str:
    """A letter that the reply ends or begins with. One letter after the other, each on what the last left."""
    for letter in "ABCDE":
        ends = text.endswith((f" {letter}.", f" ({letter})."))
        begins = text.startswith((f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n"))
        text = letter if ends or begins else text
    return text


def _number_behind_is(text: str) -> str:
    last = text.rsplit("is ", 1)[-1].rstrip(".")
    return last if _is_number(last) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cut(text: str) -> str:
    """What follows the last `the answer is`, to the end of its sentence; or the last of several boxes."""
    if "oxed{" in text:
        return r"\boxed{" + text.rsplit("oxed{", 1)[-1] if text.count("oxed{") > 1 else text
    for lead in _LEADS:
        for spelled in (lead, lead.replace("the", "The")):
            if spelled in text:
                rest = text.rsplit(spelled, 1)[-1].strip()
                text = rest.split("\n", 1)[0].split(". ", 1)[0]
            else:
                text = text.strip()
    return text


def _boxed(text: str) -> str:
    r"""From the first `oxed{` to the last brace; a brace that closes and was not opened ends the answer."""
    text = text.replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if 0 <= start <= end - len("oxed{"):
        text = text[start + len("oxed{") : end]
    closes, opens = text.find("}"), text.find("{")
    return text[:closes] if closes != -1 and (opens == -1 or closes < opens) else text


def _cleaned(text: str) -> str:
    r"""The right side of an equation without spaces, units, `\text`, `\left`, degrees and dollars."""
    text = text.rsplit("=", 1)[-1].rsplit(r"\approx", 1)[-1]
    if len(text) > _LONGEST:
        return text
    text = text.replace(" ", "").replace(r"\,", "").replace("∞", r"\infty").replace(r"+\infty", r"\infty")
    text = text.replace("\\\\", "\\")
    for piece in _DROPPED:
        text = text.replace(piece, "")
    text = text.replace("bmatrix", "pmatrix").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace(r"\left", "").replace(r"\right", "")
    for piece in (r"^{\circ}", r"^\circ", r"\$", "$", r"\%"):
        text = text.replace(piece, "")
    return _fractions(text.replace("{.", "{0."))


def _fractions(text: str) -> str:
    """Braces that LaTeX lets one leave out, and fractions in one form."""
    text = "0" + text if text.startswith(".") else text
    if "sqrt" in text:  # fractions, too, only beside a root
        text = _braced_fractions(_braced_roots(text))
    text = r"\frac{1}{2}" if text == "0.5" else text
    over = _SLASH.fullmatch(text)
    return rf"\frac{{{over[1]}}}{{{over[2]}}}" if over else text


def _braced_roots(text: str) -> str:
    head, *parts = text.split(r"\sqrt")
    braced = [part if part[:1] in ("", "{") else f"{{{part[0]}}}{part[1:]}" for part in parts]
    return r"\sqrt".join([head, *braced])


def _braced_fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{2}` with all their braces; unchanged if one has too little behind it."""
    head, *parts = text.split(r"\frac")
    done = [head]
    for part in parts:
        if part.startswith("{"):
            done.append(part)
        elif len(part) < 2:
            return text
        else:
            upper, lower = part[0], part[1]
            done.append(f"{{{upper}}}" + (part[1:] if lower == "{" else f"{{{lower}}}{part[2:]}"))
    return r"\frac".join(done)


def equality(gold: str, answer: str) -> bool | Equal:
    """Equal, different, or a question for a worker."""
    gold, answer = gold.lower(), answer.lower()
    if not gold.replace(" ", "") or not answer.replace(" ", ""):
        return False
    if gold.strip() == answer.strip():
        return True
    if _PLAIN.fullmatch(gold) and _PLAIN.fullmatch(answer):
        return round(float(gold), 2) == round(float(answer), 2)
    return Equal("mathvision_equal", gold, answer) if _readable(gold) and _readable(answer) else False


def _readable(text: str) -> bool:
    """Whether it could have a value, or be a tuple of values: a cheap look before a worker is asked."""
    if len(text) > _LONGEST_FORMULA or _TOWER.search(text) or _depth(text) > _DEEPEST:
        return False
    if text[0] in "([" and text[-1] in ")]" and "," in text:
        pieces = [
            piece for piece in text[1:-1].split(",") if "infty" not in piece and piece not in ("a", "-a")
        ]
    else:
        pieces = [text]
    return not any(_WORD.search(_COMMAND.sub("", piece)) for piece in pieces)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
