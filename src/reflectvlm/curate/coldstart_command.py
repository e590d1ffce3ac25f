"""`reflectvlm data coldstart`: a cold start for Look-Back or Qwen-LA, from questions and a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reflectvlm.curate.choosing import Rewrite
from reflectvlm.curate.coldstart import ColdStart
from reflectvlm.curate.most_calls import Most
from reflectvlm.curate.requests import insert_request, judge_request, rewrite_request
from reflectvlm.curate.set_command import Cast, make_set
from reflectvlm.curate.set_words import KEYS as COMMON
from reflectvlm.curate.set_words import instruction_text, method_of
from reflectvlm.curate.types import Question
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import say

HELP = """\
reflectvlm data coldstart: make the cold start that the papers did not release

  reflectvlm data coldstart method=semantic_back source=rows.jsonl model=local:Qwen/Qwen2.5-VL-7B-Instruct
                            teacher=http://localhost:8000/v1,model=NAME out=cold
  reflectvlm data coldstart method=semantic_back source=digits self=true model=local:tiny out=cold
  reflectvlm train recipe=lookback_sft data=rows data.path=cold/rows.jsonl

  method=               semantic_back, solution_back (Look-Back) or qwen_la (exactly one reflection)
  source=               a file or folder of rows, NAME:FOLDER of a known data set (llava_cot:FOLDER), digits
  columns.question= columns.answer= columns.images= columns.id= columns.messages= root= max_rows= max_bad=
                        how its rows are read, and how many: max_rows= takes the first ones
  model=                who answers the questions: local:PATH, http://…/v1,model=NAME, recorded:FILE, rule
  column=               instead: the source's column that holds an answer to begin with
  teacher=              who writes the second look, in the same words; or
  self=true             nobody: it is the beginning of another answer of the model's own
  n=8 temperature=1.0 max_tokens=1024 instruction=boxed
                        answers to each question, and what is asked behind it: a name, a .txt file, none
  pass_rate=0.1:1       least and largest share of right answers of a question that is used
  agree=0.5             with self=true: least share of all answers that begin as the second look does; 0: any
  at=0.5                where reasoning is cut (semantic_back): the end of the sentence nearest to this share
  rewrite=splice        what stands before the look is kept letter by letter; rewrite=rewrite: all anew
  shares=corrected:0.3,confirmed:0.5,unneeded:0.2
                        first readings that are wrong and mended, right and confirmed, and no second look;
                        by default those of the method; a look that no question can have is left out of
                        these, and one of shares= is an error
  judges= votes=2       who votes on each trace; give judges= several times. So many "incorrect" (of one judge
                        1) leave it out
  without=              evaluation sets whose rows must not be in it, nor be asked about: benchmarks' names
                        below data_dir=data, files; without.question=… and the words of data overlap, as
                        without.distance=null
  limit=                most rows of the set. No fewer questions are answered for it: max_rows= takes fewer
  out=                  the folder. The same words again go on after a kill, and ask again what a server
                        did not answer. Exit code 1: the set has no row
  cache=                folder of all replies, by default in out: nothing is asked twice
  estimate=first        say what it will take before anything is asked, and go on; only: stop there
  price=2.5:10          money per million tokens, asked and said: it is counted, and told beforehand
  seed= rows_at_once=64
"""

KEYS = (*COMMON, "self", "n", "pass_rate", "agree", "at", "rewrite", "shares", "limit", "column")


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    given = Given.parsed(words, "data coldstart", KEYS, above=(), several=("judges",))
    cold = cold_of(given)
    specs = roles_of(given, cold)

    def made(cast: Cast) -> Mapping[str, Any]:
        return cold.run(
            cast.questions,
            cast.model,
            out=cast.out,
            teacher=cast.teacher,
            teacher_name=cast.teacher.name if cast.teacher else "",
            judges=cast.judges,
            filters=cast.filters,
            rows_at_once=cast.rows_at_once,
            before=cast.before,
        )

    def most(questions: Sequence[Question]) -> Mapping[str, Most]:
        if cold.column is None and cold.limit is not None and cold.limit < len(questions):
            which = " that are in none of without=" if "without" in given else ""
            say(
                f"limit={cold.limit} bounds the rows of the set: all {len(questions):,} questions{which} are "
                f"answered {cold.n} times. max_rows= takes fewer questions."
            )
        return most_calls(cold, questions, len(specs["judges"]))

    return make_set(given, {"command": "coldstart", **cold.card()}, specs, most, made)


def cold_of(given: Given) -> ColdStart:
    """The settings, checked."""
    method = method_of(given)
    fields = given.fields(
        ColdStart, ("n", "temperature", "max_tokens", "agree", "at", "limit", "column", "seed")
    )
    name = given.text("instruction") or ("qwen_la" if method == "qwen_la" else "boxed")
    if "shares" in given:
        fields["shares"] = shares_of(str(given.text("shares")))
    if "pass_rate" in given:
        fields["pass_rate"] = pass_rate_of(str(given.text("pass_rate")))
    return ColdStart(
        method=method,
        instruction=instruction_text(name),
        self_made=given.value("self", bool, False),
        rewrite=given.value("rewrite", Rewrite, "splice"),
        **fields,
    )


def roles_of(given: Given, cold: ColdStart) -> dict[str, list[str]]:
    """Who is asked as what. Every role that is needed must be given, and no other."""
    model, teacher = given.text("model"), given.text("teacher")
    if cold.column is None and model is None:
        raise RecipeError(
            "data coldstart needs model=: who answers the questions, e.g. model=local:tiny; or column=."
        )
    if cold.column is not None and model is not None:
        raise RecipeError("model and column are both given. The answers come from one of them.")
    if cold.self_made and teacher is not None:
        raise RecipeError("self=true and teacher are both given. The second look comes from one of them.")
    if not cold.self_made and teacher is None:
        raise RecipeError("data coldstart needs teacher=: who writes the second look; or self=true.")
    return {
        "model": [model] if model else [],
        "teacher": [teacher] if teacher else [],
        "judges": list(given.all("judges")),
    }


def most_calls(cold: ColdStart, questions: Sequence[Question], judges: int) -> dict[str, Most]:
    """Each question may become a trace, and each trace want a look unless shares were chosen: the usual ones
    go without the plain answers where nobody can have them."""
    traces = min(len(questions), cold.limit or len(questions))
    unneeded = (cold.shares or {}).get("unneeded", 0.0)
    most = traces if cold.usual else math.ceil(traces * (1 - unneeded))
    taught = 0 if cold.self_made else most
    asked = [request for question in questions for request in cold.answer_requests(question)[:1]]
    looks = [
        insert_request(question, cold.method, "confirmed", "", False, cold.max_tokens)
        if cold.rewrite == "splice"
        else rewrite_request(question, cold.method, "", cold.max_tokens)
        for question in questions
    ]
    judged = [judge_request(question, "") for question in questions]
    return {
        "model": Most.of(len(asked) * cold.n, asked),
        "teacher": Most.of(taught, looks, cold.max_tokens),
        "judges": Most.of(traces * judges, judged, cold.max_tokens),
    }


def shares_of(text: str) -> dict[Any, float]:
    """`corrected:0.3,confirmed:0.7`."""
    found: dict[Any, float] = {}
    for part in text.split(","):
        look, _, share = part.partition(":")
        try:
            found[look.strip()] = float(share)
        except ValueError as error:
            raise RecipeError(f"shares has {part!r}. Write shares=corrected:0.3,confirmed:0.7.") from error
    return found


def pass_rate_of(text: str) -> tuple[float, float]:
    """`0.1:0.9`, or the least alone."""
    low, colon, high = text.partition(":")
    try:
        return float(low), float(high) if colon else 1.0
    except ValueError as error:
        raise RecipeError(
            f"pass_rate is {text!r}. Write the least and the largest share: 0.1:0.9."
        ) from error
