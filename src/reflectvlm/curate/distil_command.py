"""`reflectvlm data distill`: a policy's answers, judged, the wrong ones rewritten by a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reflectvlm.curate.distil import Distillation
from reflectvlm.curate.most_calls import Most
from reflectvlm.curate.requests import judge_request, rewrite_request
from reflectvlm.curate.set_command import Cast, make_set
from reflectvlm.curate.set_words import KEYS, instruction_text, method_of
from reflectvlm.curate.types import Question
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError

HELP = """\
reflectvlm data distill: the policy answers, judges vote, a stronger teacher rewrites what they call incorrect

  reflectvlm data distill source=llava_cot:FOLDER model=local:runs/qwen_la_brpo/model
                          judges=http://a/v1,model=A judges=http://b/v1,model=B
                          judges=http://c/v1,model=C judges=http://d/v1,model=D
                          teacher=http://e/v1,model=E out=zero40k
  reflectvlm data distill source=digits model=local:tiny judges=rule teacher=rule out=small estimate=only
  reflectvlm data review zero40k/to_review.jsonl
  reflectvlm train recipe=qwen_la_copy data_from=null data=rows data.path=zero40k/rows.jsonl

  source= columns.…= root= max_rows= max_bad=     as for data coldstart
  method=qwen_la        the layout of the answers; or semantic_back, solution_back
  model=                the policy: local:PATH, http://…/v1,model=NAME, recorded:FILE, rule
  instruction=          what it is asked behind the question, by default the layout's own; a .txt file, none
  temperature=0 max_tokens=1024
  judges=               who votes, several times; votes=2 (of one judge 1): so many "incorrect" and the
                        answer is rewritten
  teacher=              who rewrites
  without= out= cache= estimate=only price= seed= rows_at_once=     as for data coldstart

out/to_review.jsonl lists what people should look at: rewritten answers, and those that judges differ
about or have no word for.
"""


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    given = Given.parsed(words, "data distill", KEYS, above=(), several=("judges",))
    distillation = distillation_of(given)
    specs = roles_of(given)

    def made(cast: Cast) -> Mapping[str, Any]:
        assert cast.model is not None
        assert cast.teacher is not None
        return distillation.run(
            cast.questions,
            cast.model,
            cast.judges,
            cast.teacher,
            out=cast.out,
            policy_name=cast.model.name,
            teacher_name=cast.teacher.name,
            filters=cast.filters,
            rows_at_once=cast.rows_at_once,
            before=cast.before,
        )

    def most(questions: Sequence[Question]) -> Mapping[str, Most]:
        return most_calls(distillation, questions, len(specs["judges"]))

    return make_set(given, {"command": "distill", **distillation.card()}, specs, most, made)


def most_calls(way: Distillation, questions: Sequence[Question], judges: int) -> dict[str, Most]:
    """Each answer may have to be rewritten."""
    count = len(questions)
    asked = [request for question in questions for request in way.answer_requests(question)]
    judged = [judge_request(question, "") for question in questions]
    rewritten = [rewrite_request(question, way.method, "", way.max_tokens) for question in questions]
    return {
        "model": Most.of(count, asked),
        "judges": Most.of(count * judges, judged, way.max_tokens),
        "teacher": Most.of(count, rewritten, way.max_tokens),
    }


def distillation_of(given: Given) -> Distillation:
    """The settings, checked."""
    method = method_of(given, "qwen_la")
    name = given.text("instruction") or method
    fields = given.fields(Distillation, ("temperature", "max_tokens", "seed"))
    return Distillation(method=method, instruction=instruction_text(name), **fields)


def roles_of(given: Given) -> dict[str, list[str]]:
    needed = {"model": "who answers", "judges": "who votes", "teacher": "who rewrites"}
    for role, what in needed.items():
        if role not in given:
            raise RecipeError(f"data distill needs {role}=: {what}, e.g. {role}=rule for pages of digits.")
    return {role: list(given.all(role)) for role in needed}
