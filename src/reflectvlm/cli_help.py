"""What `reflectvlm --help` and `reflectvlm COMMAND --help` print: a list, and of a command its usage, two
examples or more, and its words. `data SUB --help` is in the modules of these commands.
"""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "recipes": "what there is to run",
    "show": "one recipe with all its values",
    "train": "run a recipe; all that comes of it goes to runs/",
    "doctor": "look for what would go wrong in a recipe, without training",
    "plan": "memory and seconds of a step, before anything is loaded",
    "pipeline": "a whole chain of recipes, and the table that compares",
    "generate": "ask a model: one question about an image, or a file of rows",
    "attention": "what a model looks at: figures and numbers",
    "eval": "benchmarks, each by its own rule and by ours",
    "score": "score replies that are there, of any tool",
    "data": "make, check, mix and review data",
    "inspect": "how far a run came, which of its checkpoints are whole, what is in a dumped batch",
    "report": "a run, or two beside each other, as one HTML file",
}

_VALUES = """\
Values, after the recipe:
  key=value             change a key that the recipe shows; dots go deeper: optimizer.lr=1e-5
  +key=value            add an argument that the recipe does not show
  policy=tiny data=digits
                        choose a whole node: a file of recipes/policy/ or recipes/data/
  "key='a, b = c'"      a text with commas, brackets or '=': two kinds of quotes
  recipe:key=value      change a key of a recipe that this one is made from, however deep; '*:key=value'
                        changes it in it and all of those that have it
"""
_SHORT = """\
Short names:
  resume=auto           go on with the run of this name where it stopped (output.resume)
  max_minutes=55        save and exit with code 75 before so many minutes are over, stages included
  save_every= eval_every= root= keep=
                        the keys of the same name under output
"""
_PROCESSES = """\
Several processes, each with a part of the work; the result is the same:
  gpus=8                one process per GPU; processes=2 on a machine without one
  nodes=2 node_rank=0 main_address=node-a main_port=29500
                        the same command on each machine, with its own node_rank; torchrun, accelerate launch
                        and deepspeed start `-m reflectvlm train …` without these words
  compute=zero2         how weights, gradients and moments are shared: single, ddp, zero1, zero2, zero3
"""
_STAGES = """\
Recipes that start from another one (start_from), or take its rows (data_from), run that one first, once,
and keep what it makes in $REFLECTVLM_CACHE, or ~/.cache/reflectvlm. start_from=null policy.path=… starts
from a model of yours, data_from=null data.path=… takes your rows.
"""
_EXIT = """\
Exit codes: 0 done, 1 the run failed, 2 something you wrote is wrong; 143, 130 or 129 stopped by SIGTERM,
Ctrl-C or SIGHUP, 75 by max_minutes (saved; go on with resume=auto); 69 and 70 in one of several processes
that another has left alone, or told of its error. REFLECTVLM_TRACEBACK=1 shows where an error comes from.
"""
_MODEL = """\
The model, and how it answers:
  model=                tiny, a folder (a run's model/) or a hub name. How it looks at the image again and
                        its instruction are those that it was trained with, unless you give others:
  reattention=route     or copy (show the image again) or implicit (do not)
  reattention.m=25 reattention.trigger='<back>' reattention.limit=2
                        a setting of it; alone it changes the one that the model carries
  instruction=          a name, a .txt file, or none; instruction.place=system
  max_tokens= temperature= top_p= top_k= min_p= stop= seed=
                        how tokens are drawn; by default the likeliest, at most 1024. Commas separate
                        texts that stop: stop=END,DONE; one with a comma in quotes: stop="'a, b',c"
  device= dtype= min_pixels= max_pixels= trust_remote_code=
                        where and how the model runs, and whether code that comes with it may
"""
_COLUMNS = """\
  columns.question= columns.images= columns.id= columns.messages= root= split= max_rows= max_bad= batch=
                        how rows are read, and how many are answered at one time
"""

_TEXTS: Mapping[str, tuple[str, ...]] = {
    "recipes": (
        """\
reflectvlm recipes: names and first lines of all recipes, evaluations and pipelines; it takes no words

  reflectvlm recipes
  reflectvlm recipes | grep 7b
""",
    ),
    "show": (
        """\
reflectvlm show recipe=NAME [key=value …]: the recipe with all its values, as YAML

  reflectvlm show recipe=lookback_rl
  reflectvlm show recipe=lookback_rl steps=20 > mine.yaml

A recipe of your own may begin with ours:
  defaults: [lookback_rl, _self_]
  steps: 40
""",
        _VALUES,
    ),
    "train": (
        """\
reflectvlm train recipe=NAME [key=value …]: run a recipe; all that comes of it goes to runs/NAME

  reflectvlm train recipe=lookback_rl
  reflectvlm train recipe=lookback_rl steps=20 variant=solution optimizer.lr=2e-4
  reflectvlm train recipe=./mine.yaml gpus=8 resume=auto

  recipe=               a name of `reflectvlm recipes`, or the path of a file of yours, e.g. ./mine.yaml
""",
        _VALUES,
        _SHORT,
        _PROCESSES,
        _STAGES,
        _EXIT,
    ),
    "doctor": (
        """\
reflectvlm doctor recipe=NAME [key=value …]: look for what would go wrong in a run, without training

  reflectvlm doctor recipe=lookback_rl
  reflectvlm doctor recipe=./mine.yaml data=rows data.path=rows.jsonl

It takes the words of train but for those of several processes. Exit code 1: something would go wrong.
""",
        _VALUES,
        _STAGES,
    ),
    "plan": (
        """\
reflectvlm plan recipe=NAME [gpus=N] [gpu=NAME] [key=value …]: will it fit, and how long is a step

  reflectvlm plan recipe=lookback_rl_7b gpus=8 gpu=80GB
  reflectvlm plan recipe=lookback_rl_7b gpus=16 gpu=H200 compute=zero3 --json

  gpus= gpu=            how many, and which: memory (80GB) or a name (A100-80GB, H100, H200, L40S, RTX-4090)
  prompt= answer= visual=
                        tokens of a usual row; without them every row is as long as the recipe allows
  --json                the plan as one line of JSON. Exit code 1: it does not fit
""",
        _VALUES,
    ),
    "pipeline": (
        """\
reflectvlm pipeline NAME [key=value …]: a whole chain of recipes, and the table that compares

  reflectvlm pipeline qwen_la
  reflectvlm pipeline qwen_la steps=2 rows=8 held_out.data.size=8
                                  a first look at it: key=value changes every stage that has the key
  reflectvlm pipeline ./mine.yaml seed=1 qwen_la_brpo:steps=40
                                  your own file; recipe:key=value changes one stage
""",
        _VALUES,
        _SHORT,
        _PROCESSES,
        _EXIT,
    ),
    "generate": (
        """\
reflectvlm generate model=PATH image=FILE question="…"
reflectvlm generate model=PATH data=ROWS out=ANSWERS

  reflectvlm generate model=runs/NAME/model image=page.png question="Which digit is upper left?"
  reflectvlm generate model=tiny data=rows.jsonl out=answers.jsonl resume=auto

  image=a.png,b.png     files or web addresses; also image= several times
  question=             what is asked
  data= out= resume=auto
                        a file or folder of rows, gold answers not needed; one JSON line per row, and
                        what is in the file is not answered again
"""
        + _COLUMNS,
        _MODEL,
    ),
    "attention": (
        """\
reflectvlm attention model=PATH image=FILE question="…"     one answer
reflectvlm attention model=PATH data=ROWS                   answers to many rows, and controls

  reflectvlm attention model=runs/NAME/model image=page.png question="Which digit is upper left?"
  reflectvlm attention model=runs/NAME/model data=digits compare=implicit,copy,text controls=all

  out=FOLDER            where figures (PNG, SVG) and numbers (JSON, CSV) go; attention/ unless given
  layers=0,2,-1         of these decoder layers; layers=each: of all, with the maps of each one
  tags=back,REFLECTION query=step chunk=64
                        what is shaded; the query that predicted a token instead of its own; memory

One answer:
  image= question=      files or web addresses, and what is asked
  answer=FILE           a text to look at instead of an answer of the model
  at='upper left' at=7  heat maps at these words, wherever they stand; else of first look and look back

Many:
  data=digits           or a file or folder of rows; columns boxes and asked say where objects are
  compare=implicit,copy,route,text
                        ways to look again; text: as many text tokens instead of the image
  controls=removal,splice
                        or all, none: grey what is asked about; begin with a wrong reading
  width=8               tokens of a step of the length
"""
        + _COLUMNS,
        _MODEL,
    ),
    "eval": (
        """\
reflectvlm eval model=PATH tasks=NAME,NAME data_dir=DATA
reflectvlm eval recipe=NAME model=PATH data_dir=DATA [key=value …]

  reflectvlm eval model=runs/NAME/model tasks=digits
  reflectvlm eval model=runs/NAME/model tasks=mathvista,pope data_dir=data
  reflectvlm eval recipe=lookback_eval model=runs/NAME/model data_dir=data

  tasks=mathvista,pope  benchmarks by name; mathvista.split=test is a setting of one
  data_dir=data         where their files are; what is missing is told, and where to get it
  out= resume=auto      a folder for replies, figures and table; by default runs/NAME/eval or evals/MODEL.
                        resume=auto goes on with the replies that are there, if their settings are the same
  scorers=official,lookback,strict
                        each benchmark's own rule, Look-Back's published one, and ours; the table shows all
  samples=8 temperature=1
                        several replies to each item: pass@k and avg@k
  answer_from=          where the strict scorer looks: auto (where the instruction says), boxed, answer,
                        CONCLUSION, or another tag in brackets: '<final>'
  ask=URL ask.model=… ask.key_env=… ask.cache=FILE
                        a language model behind an OpenAI-compatible server, for rules that need one
  limit= batch=         only the first items of each task; how many are answered at one time
  recipe=               lookback_eval or qwen_la_eval, or your own; then tasks= chooses among its tasks
""",
        _MODEL,
    ),
    "score": (
        """\
reflectvlm score FILE [task=NAME data_dir=DATA] [against=FILE2]: no model is loaded

FILE has replies of eval, Look-Back, VLMEvalKit (xlsx, tsv, csv, json) or lmms-eval (its samples log).

  reflectvlm score evals/mine/predictions-mathvista.jsonl data_dir=data
  reflectvlm score results/MathVista.xlsx task=mathvista data_dir=data against=evals/mine/predictions.jsonl

  task= data_dir=       whose gold answers and rule count; without them those in the file. Of a file of eval
                        its card says both, and settings and limit; what is said here counts over it
  mathvista.split=test  a setting of the task
  against=FILE2         the gain over another file, with its interval and McNemar's test
  out=FOLDER            write marks, figures and table there
  scorers=official,lookback,strict
                        each benchmark's own rule, Look-Back's published one, and ours; the table shows all
  answer_from=          where the strict scorer looks: auto (where the instruction says), boxed, answer,
                        CONCLUSION, or another tag in brackets: '<final>'
  ask=URL ask.model=… ask.key_env=… ask.cache=FILE
                        a language model behind an OpenAI-compatible server, for rules that need one
  limit=                only the first items; limit=null: all, where the card has a limit
""",
    ),
    "inspect": (
        """\
reflectvlm inspect PATH [model=PATH] [rows=8]: of a run, a checkpoint, or a dumped batch

  reflectvlm inspect runs/NAME    how far a run came, which of its checkpoints are whole
  reflectvlm inspect runs/NAME/nonfinite-step-12 rows=20
                                  the batch of a step that gave no finite loss

  model=                makes text of a dump's tokens with that model's tokenizer
  rows=8                shows the text of so many rows of a dump
""",
    ),
    "report": (
        """\
reflectvlm report RUN [against=RUN2] [out=FILE.html] [attention=N]: curves, table, answers token by token

  reflectvlm report runs/NAME
  reflectvlm report runs/NAME against=runs/OTHER out=both.html
  reflectvlm report runs/NAME attention=40

  against=              sets another run beside it
  out=FILE.html         where the page goes; RUN/report.html unless given
  attention=40          adds where so many answers looked; it loads the run's model
""",
    ),
}


def overview() -> str:
    """The commands, a line each."""
    lines = "".join(f"  {name:<10} {line}\n" for name, line in COMMANDS.items())
    return f"""\
reflectvlm: RL and SFT that teach a vision-language model to look at its image again

{lines}
  reflectvlm COMMAND --help         its words and examples
  reflectvlm train recipe=grpo      for a beginning

{_EXIT}"""


def help_of(command: str) -> str:
    """Usage, examples and words of one of `COMMANDS` but `data`, which has commands of its own."""
    return "\n".join(_TEXTS[command])
