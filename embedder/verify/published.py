"""The values published for Qwen3-VL-Embedding-2B and Qwen3-VL-Reranker-2B, and how they were computed.

    authors' notebooks  examples/*.ipynb of QwenLM/Qwen3-VL-Embedding 8ce3aab: `reference` preprocessing in float32;
                        those of vLLM 0.14: the checkpoint's preprocessing in bfloat16
    Sentence Transformers 6, docs: the checkpoint's preprocessing in bfloat16

Only numbers, and sentences that the pages print, are here. `Examples` reads texts and pictures from a folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.inputs.regimes import RegimeName
from embedder.verify.examples import Entry, Input
from embedder.verify.probes import PUBLISHED_TEXT

PUBLISHED_MODEL, PUBLISHED_RERANKER = "Qwen3-VL-Embedding-2B", "Qwen3-VL-Reranker-2B"


@dataclass(frozen=True)
class Origin:
    """How values were computed. `max_error` in float32, if they were published so, and in bfloat16."""

    regime: RegimeName
    dtype: Literal["float32", "bfloat16"]
    max_error: float
    max_error_bfloat16: float

    def allowed(self, dtype: str) -> float:
        """The largest difference that rounding explains between the published dtype and `dtype`."""
        return self.max_error if self.dtype == dtype == "float32" else self.max_error_bfloat16


@dataclass(frozen=True)
class Similarities:
    """An example: cosines of pairs of inputs."""

    name: str
    origin: Origin
    values: tuple[tuple[Input, Input, float], ...]


@dataclass(frozen=True)
class FirstValues:
    """An example: the first values of one vector."""

    name: str
    origin: Origin
    input: Input
    values: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """An example: a reranker's probabilities for the documents of one query."""

    name: str
    origin: Origin
    query: Input
    values: tuple[tuple[Input, float], ...]
    instruction: str | None = None


# Cosines: a few bfloat16 steps (0.004 just below 1); a missing prompt costs far more.
NOTEBOOK = Origin("reference", "float32", 0.001, 0.01)
# The pictures were saved as JPEG again after their vectors were computed.
NOTEBOOK_PICTURES = Origin("reference", "float32", 0.02, 0.02)
VLLM = Origin("checkpoint", "bfloat16", 0.01, 0.01)
SENTENCE_TRANSFORMERS = Origin("checkpoint", "bfloat16", 0.01, 0.01)
# Three standard deviations of one value at a cosine of 0.997 in 2048 dimensions: sqrt(2 * 0.003 / 2048) = 0.0017.
VLLM_VALUES = Origin("checkpoint", "bfloat16", 0.005, 0.005)
# Probabilities: log-odds of bfloat16 hidden states differ by about 0.1, of which a probability keeps a quarter.
NOTEBOOK_SCORES = Origin("reference", "float32", 0.002, 0.03)
OTHER_SCORES = Origin("checkpoint", "bfloat16", 0.03, 0.03)

_QUERY = Input("A woman playing with her dog on a beach at sunset.", instruction=QUERY_INSTRUCTION)
_TEXT, _DEMO, _BOTH = Input(PUBLISHED_TEXT), Input(image="demo.jpeg"), Input(PUBLISHED_TEXT, "demo.jpeg")
_FIRST_OF_DEMO = (
    "-0.07178 -0.01807 0.01001 -0.00555 -0.04956 0.11035 -0.03613 -0.02600 -0.00319 -0.00607 0.04053 0.02441 0.03857"
)
_CAR, _BEE = Input(image="car.jpg"), Input(image="bee.jpg")
_CAR_TEXT = "A green car parked in front of a yellow building"

_IMAGE_FILE = "retrieval_results/image_retrieval_results.pkl"
_TEXT_FILE = "retrieval_results/text_retrieval_results.pkl"
# Index of the picture or passage, and its value, for each of the two queries
_PICTURES = (
    "0 0.521822 2 0.242906 8 0.123928 6 0.011299 1 0.008412 7 -0.014504 4 -0.017793 9 -0.026238 5 -0.030167 "
    "3 -0.101629",
    "6 0.518423 7 0.475043 9 0.457058 3 0.255397 5 0.056535 4 0.053377 2 0.037617 0 0.024601 8 0.012872 1 -0.128600",
)
_PASSAGES = (
    "3 0.798836 4 0.790066 0 0.770858 2 0.728108 5 0.700098 1 0.536357 255 0.482713 772 0.462406 260 0.438833 "
    "774 0.431644",
    "11 0.860865 10 0.831095 12 0.822388 13 0.816870 7 0.808051 6 0.805396 9 0.799105 8 0.791639 255 0.551818 "
    "257 0.524586",
)
_RERANKED_PICTURES = (
    "0 0.807455 8 0.148007 2 0.140278 4 0.035833 5 0.029757 1 0.019833 7 0.014357 3 0.013200 6 0.011956 9 0.010633",
    "7 0.614585 9 0.567228 6 0.561339 3 0.274049 5 0.123372 4 0.116312 8 0.089718 0 0.063985 2 0.062609 1 0.056893",
)
_RERANKED_PASSAGES = (
    "4 0.676128 2 0.625236 0 0.524764 3 0.524004 5 0.370979 1 0.284675 772 0.185049 260 0.161583 774 0.160590 "
    "255 0.143781",
    "11 0.706400 12 0.693444 10 0.678945 8 0.676947 7 0.672048 9 0.659543 13 0.646121 6 0.589063 257 0.197713 "
    "255 0.172464",
)


def _pairs(numbers: str) -> list[tuple[int, float]]:
    cells = numbers.split()
    return [(int(index), float(value)) for index, value in zip(cells[::2], cells[1::2], strict=True)]


def _picture(index: int) -> Input:
    return Input(image=f"retrieval_results/images/img_{index}.jpg")


def _passage(index: int) -> Input:
    return Input(Entry(_TEXT_FILE, ("corpus", index)))


def _caption(number: int, instruction: str | None = None) -> Input:
    return Input(Entry(_IMAGE_FILE, ("results", number, "caption")), instruction=instruction)


def _question(number: int, instruction: str | None = None) -> Input:
    return Input(Entry(_TEXT_FILE, ("results", number, "query")), instruction=instruction)


def _products(left: list[Input], right: list[Input], values: str) -> tuple[tuple[Input, Input, float], ...]:
    pairs = [(one, other) for one in left for other in right]
    return tuple((*pair, float(value)) for pair, value in zip(pairs, values.split(), strict=True))


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


EMBEDDINGS: tuple[Similarities | FirstValues, ...] = (
    Similarities("matrix: query, text", VLLM, ((_QUERY, _TEXT, 0.78962),)),
    Similarities(
        "matrix: query, text, picture, both",
        VLLM,
        (
            *((_QUERY, _DEMO, 0.71558), (_QUERY, _BOTH, 0.72365), (_TEXT, _DEMO, 0.76503), (_TEXT, _BOTH, 0.84729)),
            (_DEMO, _BOTH, 0.82388),
        ),
    ),
    FirstValues("first values of picture", VLLM_VALUES, _DEMO, tuple(map(float, _FIRST_OF_DEMO.split()))),
    *(
        Similarities(
            f"caption {number}, ten pictures",
            NOTEBOOK_PICTURES,
            tuple(
                (_caption(number, "Find images matching this description."), _picture(index), value)
                for index, value in _pairs(numbers)
            ),
        )
        for number, numbers in enumerate(_PICTURES)
    ),
    *(
        Similarities(
            f"query {number}, ten passages",
            NOTEBOOK,
            tuple(
                (_question(number, "Retrieve relevant passages."), _passage(index), value)
                for index, value in _pairs(numbers)
            ),
        )
        for number, numbers in enumerate(_PASSAGES)
    ),
    Similarities(
        "four texts, car and bee",
        SENTENCE_TRANSFORMERS,
        _products(
            [
                Input(text)
                for text in (
                    *(_CAR_TEXT, "A red car driving on a highway"),
                    *("A bee on a pink flower", "A wasp on a wooden table"),
                )
            ],
            [_CAR, _BEE],
            "0.5115 0.1078 0.1999 0.1108 0.1255 0.6749 0.1283 0.2704",
        ),
    ),
    Similarities(
        "two queries, car and bee",
        SENTENCE_TRANSFORMERS,
        _products(
            [
                Input(text, instruction=QUERY_INSTRUCTION)
                for text in (
                    "Find me a photo of a vehicle parked near a building",
                    "Show me an image of a pollinating insect",
                )
            ],
            [_CAR, _BEE],
            "0.3907 0.1490 0.1235 0.4872",
        ),
    ),
)

SCORES: tuple[Scores, ...] = (
    *(
        Scores(
            f"reranker: caption {number}, ten pictures",
            NOTEBOOK_SCORES,
            _caption(number),
            tuple((_picture(index), value) for index, value in _pairs(numbers)),
            "Given a caption, determine if the image matches the description.",
        )
        for number, numbers in enumerate(_RERANKED_PICTURES)
    ),
    *(
        Scores(
            f"reranker: query {number}, ten passages",
            NOTEBOOK_SCORES,
            _question(number),
            tuple((_passage(index), value) for index, value in _pairs(numbers)),
            "Given a query, retrieve passages that are relevant to the query.",
        )
        for number, numbers in enumerate(_RERANKED_PASSAGES)
    ),
    Scores(
        "reranker: text, picture, both",
        OTHER_SCORES,
        Input(_QUERY.text),
        ((_TEXT, 0.8600), (_DEMO, 0.7232), (_BOTH, 0.8189)),
        QUERY_INSTRUCTION,
    ),
    Scores(
        "reranker: car, bee, text, car with text",
        OTHER_SCORES,
        Input(_CAR_TEXT),
        tuple(
            (document, _probability(log_odds))
            for document, log_odds in (
                *((_CAR, 0.9375), (_BEE, -2.4375)),
                (Input("A vintage Volkswagen Beetle painted in bright green sits in a driveway."), -1.25),
                (Input("A car in a European city", "car.jpg"), 0.5),
            )
        ),
    ),
)


def inputs_of(example: Similarities | FirstValues | Scores) -> tuple[Input, ...]:
    """All inputs of an example, each once."""
    match example:
        case Similarities():
            found = [one for left, right, _ in example.values for one in (left, right)]
        case FirstValues():
            found = [example.input]
        case Scores():
            found = [example.query, *(document for document, _ in example.values)]
    return tuple(dict.fromkeys(found))
