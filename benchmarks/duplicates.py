"""Seconds and memory of finding duplicates among made texts: `python benchmarks/duplicates.py rows=100000`.

Of each hundred texts one is a copy of an earlier one and one differs in its last word.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np

from reflectvlm.curate.filters import Duplicates
from reflectvlm.curate.types import Question, Trace

WORDS = 46  # about 300 characters


def main(rows: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, 20_000)
    known = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, length)) for length in lengths]
    texts: list[str] = []
    for number in range(rows):
        if number % 100 == 97:
            texts.append(texts[number - 7])
        elif number % 100 == 98:
            texts.append(" ".join([*texts[number - 9].split()[:-1], "other"]))
        else:
            texts.append(" ".join(known[word] for word in rng.integers(0, len(known), WORDS)))
    before, started = _megabytes(), time.process_time()
    rule = Duplicates(needs="text")
    dropped = sum(rule(_trace(number, text)) is not None for number, text in enumerate(texts))
    seconds = time.process_time() - started
    print(f"{rows:,} texts of {sum(map(len, texts)) / rows:.0f} characters: {seconds:.1f} s of CPU")
    more = _megabytes() - before
    print(f"{more:.0f} MB more at the most, {dropped:,} dropped of {rows // 100 * 2:,} copies")


def _trace(number: int, text: str) -> Trace:
    return Trace(question=Question(id=str(number), question=text, answer=""), text=text, method="qwen_la")


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(int(dict(word.split("=") for word in sys.argv[1:]).get("rows", "100000")))
