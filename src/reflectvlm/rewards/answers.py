r"""Finding the answer in a text, and grading it against the gold answer.

Extraction: the last brace-balanced `\boxed{}`, or the text of a tag. Graders are strict: the whole
answer must be the number, the letter or the text, not merely contain it. All of it is pure and
linear in the text's length, and nothing is ever evaluated; only `grade_math` and `grade_lookback`
leave the process, for isolated workers. They are made of a question that is settled here or handed on
(`math_question`, `lookback_question`), so that the questions of a whole step are asked at once.

Left out: units (a number with a unit is text), spelled-out numbers, tolerances.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

from reflectvlm.rewards.hopeless import hopeless, without_exclamation
from reflectvlm.rewards.maths import Equal, settle_one
from reflectvlm.tags import find_boxes

Kind = Literal["number", "choice", "text", "math"]

_MATH_MAX_CHARACTERS = 2000
_NUMBER_MAX_CHARACTERS = 300
_NORMAL_FORM_MAX_CHARACTERS = 2000

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?"
_RATIO = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_LATEX_RATIO = re.compile(rf"([+-]?)\\[dt]?frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? ?)?"
    r"(?:\( ?([A-Z]) ?\)|([A-Z]) ?(?:[.):]|$))(.*)",
    re.IGNORECASE | re.ASCII,  # without ASCII, ſ and the Kelvin sign count as letters from A to Z
)
# Another option behind the first: "(b)" but not "f(b)"; a capital that is neither the word A or I, nor a
# unit as in "5 N", nor the start of "X-ray"; a letter after "or"; a small letter that begins the rest.
_SECOND = re.compile(
    r"(?<!\w)\( ?([A-Za-z]) ?\)"
    r"|(?<![\w°}])(?<!\d )(?![AI][ '’][a-z])([A-Z])(?!-?\w)"
    r"|\b(?:or|and|OR|AND) ([A-Z])(?!-?\w)"
    r"|^ ?(?:or |and |OR |AND |[,;/&+] ?)([A-Za-z])(?!\w)"
    r"|^ ?([a-z]) ?(?:[.)]|$)"
)
_MATHS_SIGN = re.compile(r"[\\^=<>√π∞±×÷·°]")
_MATHS_BETWEEN = re.compile(r"[-+*/()\[\]{}|]")
_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTIONS = frozenset({"sqrt", "sin", "cos", "tan", "cot", "log", "exp", "abs", "min", "max"})


def extract_boxed(text: str) -> str | None:
    r"""Content of the last brace-balanced `\boxed{…}`; of boxes in boxes, the innermost last one."""
    boxes = find_boxes(text)
    return max(boxes).content(text) if boxes else None


def extract_tag(text: str, tag: str) -> str | None:
    """Text of the last complete `<tag>…</tag>`; if a box stands in it, the content of the box."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    content = text[start + len(tag) + 2 : end].strip()
    return extract_boxed(content) or content


def extract_letter(answer: str) -> str | None:
    r"""The letter of a choice: `B`, `(b)`, `B. 12 cm`, `\text{B}`, `option B`; not `AB`, `A or B`.

    None too if what follows the letter names another option: `(A) or (B)`, `A. or B`, `(a)(b)`.
    """
    match = _CHOICE.fullmatch(" ".join(_unwrap(answer).strip("*").split()))
    if match is None:
        return None
    letter = (match[1] or match[2]).upper()
    others = (second[second.lastindex or 0].upper() for second in _SECOND.finditer(match[3]))
    return letter if all(other == letter for other in others) else None


def extract_number(answer: str) -> Fraction | None:
    r"""The value of an answer that is a number and nothing else: `-1,000`, `0.5`, `1/2`, `\frac12`.

    A dollar sign in front, `%` or a degree sign behind are dropped.
    """
    if len(answer) > _NUMBER_MAX_CHARACTERS:
        return None  # also bounds the size of the integers below
    text = _unwrap(answer).replace("\u2212", "-").removeprefix("\\$").removeprefix("$")
    text = re.sub(r"\\[,!;]|\{(?=,\})|(?<=\{,)\}", "", text)  # thin spaces and braces in 1\,000 and 1{,}000
    text = re.sub(r"^([+-])\s+", r"\1", re.sub(r"\s*/\s*", "/", text.strip()))
    text = re.sub(r"\s*(?:\\?%|°|\^\\circ|\^\{\\circ\}|\\degree)$", "", text).removesuffix(".")
    text = re.sub(r"(\\[dt]?frac)([0-9])([0-9])$", r"\1{\2}{\3}", text)
    match = _RATIO.fullmatch(text) or _LATEX_RATIO.fullmatch(text)
    if match is None:
        return None
    sign, upper, lower = match.groups()
    value, divisor = _decimal(upper), _decimal(lower) if lower is not None else Fraction(1)
    if value is None or not divisor:
        return None
    return (-value if sign == "-" else value) / divisor


def normalise(text: str) -> str:
    r"""Text for comparison: no `\text{}`, `$`, quotes or final stop; one space; case folded.

    Beyond 2,000 characters accents stay as they are spelled: sorting long runs of combining marks, as
    Unicode's normal form asks for, takes quadratic time.
    """
    plain = " ".join(_unwrap(text).split())
    if len(plain) <= _NORMAL_FORM_MAX_CHARACTERS:
        plain = unicodedata.normalize("NFC", plain)
    plain = " ".join(plain.casefold().split())
    return plain.strip("\"'*").rstrip(".!").strip() or plain


def grade_number(gold: str, answer: str) -> bool:
    wanted = extract_number(gold)
    return wanted is not None and extract_number(answer) == wanted


def grade_choice(gold: str, answer: str) -> bool:
    wanted = extract_letter(gold)
    return wanted is not None and extract_letter(answer) == wanted


def grade_text(gold: str, answer: str) -> bool:
    return bool(gold.strip()) and normalise(gold) == normalise(answer)


def grade_math(gold: str, answer: str, timeout: float = 10.0) -> bool:
    """Equal as text or by math-verify (gold first) in an isolated worker.

    Raises `RewardError` if the worker was killed or died. An answer of more than 2,000 characters, or one
    that would never be finished with (`hopeless.py`), is wrong and not parsed unless it is the gold text.
    """
    return _settled(math_question(gold, answer), timeout)


def math_question(gold: str, answer: str) -> bool | Equal:
    """What `grade_math` decides at once, or the question for a worker."""
    if grade_text(gold, answer):
        return True
    if not gold.strip() or not answer.strip() or _never_settled(answer):
        return False
    return Equal("math_equal", gold, answer)


def grade_lookback(gold: str, text: str, timeout: float = 10.0) -> bool:
    r"""The published evaluation rule of Look-Back on a whole reply, its oddities included.

    The last `\boxed{` if its braces close, else the *text* "None"; right if MathRuler or math-verify
    says so, else if the gold answer is one capital letter that occurs anywhere in the upper-cased
    answer. So a reply without a box is right when the gold answer is E, N or O. Use it to reproduce
    published scores, never to train.
    """
    require_mathruler()
    return _settled(lookback_question(gold, text), timeout) or lookback_letter(gold, text)


def graded(gold: str, answer: str, kind: Kind | None = None) -> bool | Equal:
    """Is this, cut out of a reply, the gold answer? By the gold answer's kind unless another is given: right,
    wrong, or the question for a worker. Training's accuracy and the strict scorer both ask this."""
    if answer.strip() == gold.strip():
        return True  # whatever the kind: a gold answer that its grader cannot read still equals itself
    answer = without_exclamation(answer)
    kind = kind or kind_of(gold)
    if kind == "math":
        return math_question(gold, answer)
    return {"number": grade_number, "choice": grade_choice, "text": grade_text}[kind](gold, answer)


def lookback_answer(text: str) -> str:
    """What Look-Back's rule takes for the answer: the last box if it closes, else the text "None"."""
    return _mathruler_box(text)


def lookback_question(gold: str, text: str) -> bool | Equal:
    """Look-Back's two graders; they are not asked about more than 2,000 characters, nor about what they would
    never finish with (`hopeless.py`): that is wrong unless it is the gold answer's text."""
    answer = _mathruler_box(text)
    return answer == gold.strip() if _never_settled(answer) else Equal("lookback_equal", gold, answer)


def lookback_letter(gold: str, text: str) -> bool:
    """Look-Back's second chance: one capital letter as the gold answer that occurs in the answer."""
    return bool(re.fullmatch(r"[A-Z]", gold)) and gold in _mathruler_box(text).upper()


def _settled(question: bool | Equal, timeout: float) -> bool:
    return question if isinstance(question, bool) else settle_one(question, timeout)


def _never_settled(answer: str) -> bool:
    return len(answer) > _MATH_MAX_CHARACTERS or hopeless(answer)


def require_mathruler() -> None:
    missing = [name for name in ("mathruler", "pylatexenc", "sympy", "tqdm") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"rule='lookback' needs the optional package(s) {', '.join(missing)}. "
            "MathRuler does not name its own dependencies: pip install mathruler pylatexenc sympy tqdm, "
            "or use rule='strict'."
        )


@lru_cache(maxsize=1024)
def kind_of(gold: str) -> Kind:
    """A single letter is a choice, a number a number, what has maths in it is maths, the rest text."""
    if re.fullmatch(r"\(?[A-Za-z]\)?", gold.strip()):
        return "choice"
    if extract_number(gold) is not None:
        return "number"
    if _MATHS_SIGN.search(gold):
        return "math"
    words = {word.lower() for word in _WORD.findall(gold)}
    return "math" if _MATHS_BETWEEN.search(gold) and words <= _FUNCTIONS else "text"


def _mathruler_box(text: str) -> str:
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + len("\\boxed{"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth < 0:
            return text[start + len("\\boxed{") : end].strip()
    return "None"


def _unwrap(text: str) -> str:
    r"""Drops `$…$`, `\(…\)` and `\text{…}` around a whole answer, and `\text{}` inside it."""
    text = _WRAPPER.sub(r"\1", text.strip())
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1]
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2]
    return text.strip()


def _decimal(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:
        return None  # "", "." and "e5" pass the pattern and are no numbers
