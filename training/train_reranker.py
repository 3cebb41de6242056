"""Train the bundled reranker: `python -m training.train_reranker [--data FOLDER] [--run FOLDER] [--out FOLDER]`.

Training plain pairs from the embedder's weights stays at chance, so it goes in four stages. The first three save their
state, and the command resumes from it.

1. `trunk` continues the training of the bundled embedder, on drawings that are mixed of two styles.
2. `states` adds a layer that multiplies two vectors, with weights that are set and not learned, and trains the layers
   below it to have these vectors where it expects them: the query's at the last token before the document, the
   document's at the last token, each as the trunk has it without the other.
3. `vectors` trains these two vectors further, with the losses of the embedder.
4. The mean of the weights before and after stage 3; a logistic regression sets the scores' threshold.

Stages 2 and 3 do not train the vision tower, which is the trunk's. With `--start`, the language model of that reranker
takes the place of stage 2.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import processors
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3VLModel

from benchmarks.random_checkpoint import write_checkpoint
from training import data as pictures
from training import forward, pairs
from training.data import COLORS
from training.last_layer import ANSWER, LENGTH, OTHERS, VECTOR, mark_loss, set_threshold, with_last_layer
from training.prepare import HELD_OUT_STYLE
from training.prompt import TAIL
from training.train import (
    BASIC_COLORS,
    MOSTLY_SMALL,
    Captions,
    Example,
    Masters,
    Stage,
    Training,
    divergence,
    drawn_from,
    feature_vectors_of,
    parse_options,
    picture_vectors_of,
    run_stage,
    run_steps,
    softmax_loss,
    text_vectors_of,
    to_pixels,
)
from training.train import (
    OUT as EMBEDDER,
)

OUT = EMBEDDER.with_name("default_reranker")
INSTRUCTIONS = (
    "Retrieve images or text relevant to the user's query.",
    "Find the picture that matches the text.",
    "Given a query, retrieve relevant pictures.",
)
IMITATED_SCALE = 25.0  # of the trunk's cosines, in the softmax to imitate

TRUNK = Stage(
    1100,
    5e-4,
    3072,
    MOSTLY_SMALL,
    swatches=0.06,
    shapes=0.02,
    texts=256,
    strength=0.9,
    clips=0.03,
    pairs=0.04,
    late_keywords=True,
    smaller=(0.1, 0.8, 0.1),
    mixed=0.7,
)
NUM_TRUNK_STAGES, NUM_AVERAGED = 4, 2


MAX_PIXELS = 96 * 96  # larger pictures are reduced; the trunk recognizes drawings of the held-out vendor best like this
SIZES = {(96, 96): 0.9, (64, 64): 0.04, (64, 128): 0.03, (128, 64): 0.03}


@dataclass(frozen=True)
class PairStage:
    """The parameters of one training stage of pairs. `confused`: groups of documents that are easily confused.

    A group has at most `CONFUSED_WITH` documents.
    """

    steps: int
    learning_rate: float
    queries: int
    documents: int
    confused: int
    kind: Literal["states", "vectors"]
    more_queries: int = 0  # without documents, since a query takes little time
    last_rate: float = 0.03


STATES = (
    PairStage(600, 1e-3, queries=2, documents=64, confused=0, kind="states", more_queries=128),
    PairStage(1400, 6e-4, queries=2, documents=64, confused=0, kind="states", more_queries=128),
)
VECTORS = PairStage(1400, 3.5e-4, queries=1, documents=256, confused=8, kind="vectors", more_queries=384)
NUM_VECTOR_STAGES = 3  # each followed by the mean with the weights before it
CALIBRATION = PairStage(0, 0.0, kind="vectors", queries=24, documents=24, confused=3)
MAX_PICTURE_QUERIES = 96  # of a batch, because a picture has more tokens than most texts
CONFUSED_WITH = 16  # nearest drawings, of which the others of a group are chosen
PICTURES = Stage(0, 0.0, 0, MOSTLY_SMALL, swatches=0.0, shapes=0.0, strength=0.9, late_keywords=True, mixed=0.6)
KINDS = {"image": 0.84, "text": 0.08, "both": 0.08}  # of documents
QUERY_KINDS = {"text": 0.9, "image": 0.06, "both": 0.04}


def stored_dtype(name: str) -> torch.dtype:
    """Of a weight in the checkpoint: the largest ones take 8 bits, so that the package grows by less than 10 MB."""
    is_large = "embed_tokens" in name or ("merger" in name and "linear" in name and name.endswith("weight"))
    return torch.float8_e4m3fn if is_large else torch.bfloat16


def round_to_stored(name: str, weight: Tensor) -> None:
    weight.copy_(weight.to(stored_dtype(name)).to(weight.dtype))


class RerankerTraining:
    """The reranker's weights and optimizers, and the trunk whose vectors it starts from."""

    def __init__(self, data: Path, run: Path, trunk: Path, seed: int, start: Path | None = None) -> None:
        """`start`: a reranker whose language model is trained further. None: the trunk's, with one more layer."""
        self.examples = Training(data, run, seed, trunk)
        self.examples.captions = Captions(data, late=True)
        self.random = self.examples.random
        self.teacher = self.examples.model
        self.tokenizer = reranker_tokenizer(trunk)
        if start is None:
            self.model = with_last_layer(self.teacher, self.tokenizer)
        else:
            self.model = Qwen3VLModel.from_pretrained(start, dtype=torch.bfloat16)
            self.model.visual.load_state_dict(self.teacher.visual.state_dict())
        self.proxies = nn.Parameter(self.examples.proxies.detach()[:, VECTOR].clone())
        self.log_scale = nn.Parameter(torch.tensor(math.log(35.0)))
        self.masters = Masters(self.model, {self.proxies: 4.0, self.log_scale: 2.0}, round_to_stored)
        self.nearest = nearest_of(self.examples.proxies.detach())
        self.common = {
            text: torch.tensor(self.tokenizer(pairs.prefix_text(text)).input_ids)
            for text in (pairs.INSTRUCTION, *INSTRUCTIONS)
        }

    def step(self, stage: PairStage, learning_rate: float) -> dict[str, float]:
        """Make one update and return the losses by name."""
        losses = self.state_losses(stage) if stage.kind == "states" else self.vector_losses(stage)
        sum(losses.values()).backward()
        self.masters.update(learning_rate)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def batch(self, stage: PairStage) -> tuple["Side", "Side"]:
        random = self.random
        size = drawn_from(SIZES, self.random)
        examples = self.documents(stage, size)
        documents = self.side(examples, drawn_from(KINDS, random), size, TAIL)
        targets = np.array([example.target for example in examples])
        if stage.queries < stage.documents:
            targets = random.choice(targets, stage.queries, replace=False)
        return self.queries(targets), documents

    def queries(self, targets: np.ndarray) -> "Side":
        """Texts or images of these drawings and colors, all of one kind; not all of them if they are many images."""
        kind, size = drawn_from(QUERY_KINDS, self.random), drawn_from(SIZES, self.random)
        if kind == "text":
            asked = [self._text(int(target)) for target in targets]
        else:
            asked = [self._drawing(int(target), size) for target in targets[:MAX_PICTURE_QUERIES]]
        return self.side(asked, kind, size, pairs.AFTER_QUERY)

    def documents(self, stage: PairStage, size: tuple[int, int]) -> list[Example]:
        """Half of them in groups of drawings or colors that are easily confused, the others at random, mixed."""
        random, captions = self.random, self.examples.captions
        chosen: list[int] = []
        in_group = stage.documents // 2 // max(1, stage.confused)
        for _ in range(stage.confused):
            if random.random() < 0.08:
                first = captions.num_drawings + int(random.choice(BASIC_COLORS))
            else:
                first = int(random.integers(captions.num_drawings))
            others = random.choice(self.nearest[first], in_group - 1, replace=False)
            chosen += [first, *(int(other) for other in others)]
        while len(chosen) < stage.documents:
            color = random.random() < 0.06
            chosen.append(
                int(random.integers(len(COLORS))) + captions.num_drawings
                if color
                else int(random.integers(captions.num_drawings))
            )
        chosen = [chosen[place] for place in random.permutation(len(chosen))]
        return [self._drawing(target, size) for target in chosen]

    def side(self, examples: list[Example], kind: str, size: tuple[int, int], end: str) -> "Side":
        texts = ["" if kind == "image" else example.text for example in examples]
        if kind == "text":
            return Side(pairs.part_of(self.tokenizer, texts, end), examples, kind, texts, size)
        with torch.no_grad():
            features = forward.see(self.model, to_pixels([example.frames[0] for example in examples]))
        return Side(pairs.part_of(self.tokenizer, texts, end, size, features), examples, kind, texts, size)

    def common_ids(self) -> Tensor:
        chosen = pairs.INSTRUCTION
        if self.random.random() < 0.2:
            chosen = INSTRUCTIONS[self.random.integers(len(INSTRUCTIONS))]
        return self.common[chosen]

    def state_losses(self, stage: PairStage) -> dict[str, Tensor]:
        """The squared differences of the states before the last layer from those that it expects."""
        queries, documents = self.batch(stage)
        scored = pairs.Scored(self.model, self.tokenizer, self.common_ids(), queries.part, documents.part)
        more = self.queries(self.random.integers(self.examples.captions.num_proxies, size=stage.more_queries))
        more_states = pairs.read_queries(self.model, scored.common, scored.start, more.part)
        at_query = pairs.last_state(more_states.before_last_layer, more.part)[:, 0].float()
        at_document = pairs.last_state(scored.documents.before_last_layer, documents.part).float()
        with torch.no_grad():
            asked, found = (self.taught(side) * LENGTH for side in (more, documents))
        return {
            "query": (at_query[:, VECTOR] - asked).square().sum(-1).mean() / LENGTH**2,
            "document": (at_document[..., VECTOR] - found).square().sum(-1).mean() / LENGTH**2,
            "empty": empty_loss(at_query, at_document),
            "mark": mark_loss(scored.states, queries.part, documents.part),
        }

    def vector_losses(self, stage: PairStage) -> dict[str, Tensor]:
        """The losses of the embedder's training, with the vectors in the states before the last layer.

        A softmax over all proxies for queries and for documents, InfoNCE between them, and the trunk's vectors and
        similarities to imitate. The documents follow one of the queries, so that they learn to have their vector after
        any.
        """
        queries, documents = self.batch(stage)
        scored = pairs.Scored(self.model, self.tokenizer, self.common_ids(), queries.part, documents.part)
        targets = [example.target for example in documents.examples]
        others = self.random.integers(self.examples.captions.num_proxies, size=stage.more_queries - len(targets))
        more = self.queries(np.array([*targets, *others]))
        more_states = pairs.read_queries(self.model, scored.common, scored.start, more.part)
        at_query = pairs.last_state(more_states.before_last_layer, more.part)[:, 0].float()
        at_document = pairs.last_state(scored.documents.before_last_layer, documents.part)[0].float()
        asked, found = (F.normalize(states[:, VECTOR], dim=-1) for states in (at_query, at_document))
        positive = torch.tensor(
            [[one.target in query.meaning for one in documents.examples] for query in more.examples]
        )
        scale = self.log_scale.exp()
        with torch.no_grad():
            to_ask, to_find = self.taught(more), self.taught(documents)
        taught = to_ask @ to_find.T * IMITATED_SCALE
        similar = asked @ found.T
        distances = [(one - other).square().sum(-1).mean() for one, other in ((asked, to_ask), (found, to_find))]
        lengths = [states[:, VECTOR].norm(dim=-1) / LENGTH - 1 for states in (at_query, at_document)]
        return {
            "query": 1.5 * self.proxy_loss(asked, more),
            "document": self.proxy_loss(found, documents),
            "pairs": (softmax_loss(similar * scale, positive) + softmax_loss(similar.T * scale, positive.T)) / 2,
            "imitation": divergence(similar * IMITATED_SCALE, taught)
            + divergence(similar.T * IMITATED_SCALE, taught.T),
            "distance": 3 * sum(distances),
            "length": sum(length.square().mean() for length in lengths),
            "empty": 3 * empty_loss(at_query, at_document),
            "mark": 3 * mark_loss(scored.states, queries.part, documents.part),
        }

    def proxy_loss(self, vectors: Tensor, side: "Side") -> Tensor:
        """Cross-entropy over the proxies. A text means what its text means, an item with an image only that drawing."""
        meanings = [one.meaning if side.kind == "text" else {one.target} for one in side.examples]
        logits = vectors @ F.normalize(self.proxies, dim=-1).T * self.log_scale.exp()
        return -(self.examples.shares(meanings) * F.log_softmax(logits, dim=-1)).sum(-1).mean()

    def calibrate(self, batches: int = 20) -> None:
        """Set scale and threshold of the last layer, so that a score of 0.5 separates correct documents from others.

        They are those of a logistic regression on batches whose documents are easily confused.
        """
        layer, norm = self.model.language_model.layers[-1], self.model.language_model.norm.weight
        with torch.no_grad():
            norm.fill_(1)
            set_threshold(layer.mlp, 0.0)
            found = [self.answers() for _ in range(batches)]
        answers, right = (torch.cat([one[place] for one in found]) for place in range(2))
        scale, threshold = logistic_fit(answers, right)
        # the threshold is subtracted as a multiple of the query's squared vector, which has the same length for all
        with torch.no_grad():
            set_threshold(layer.mlp, 1.0)
            squares = torch.cat([self.answers()[0] for _ in range(3)]).mean() - answers.mean()
            set_threshold(layer.mlp, float(threshold / -squares))
            norm.zero_()
            norm[ANSWER] = scale / pairs.score_direction(self.model, self.tokenizer)[ANSWER]
        self.masters.read()

    def answers(self) -> tuple[Tensor, Tensor]:
        """The last layer's answers for a batch of pairs, and whether each is correct, both flat."""
        queries, documents = self.batch(CALIBRATION)
        scored = pairs.Scored(self.model, self.tokenizer, self.common_ids(), queries.part, documents.part)
        return scored.last()[..., ANSWER].flatten(), positives(queries, documents).flatten()

    def taught(self, side: "Side") -> Tensor:
        """The trunk's unit vectors of the items, (num_items, 64). The two vision towers differ by rounding only."""
        if side.part.features is None:
            vectors = text_vectors_of(self.examples, side.texts)
        else:
            texts = side.texts if side.kind == "both" else None
            vectors = feature_vectors_of(self.examples, side.part.features, side.size, texts)
        return F.normalize(vectors[:, VECTOR], dim=-1)

    def state(self) -> dict[str, Any]:
        heads = [self.proxies.data, self.log_scale.data]
        return {**self.masters.state(), "heads": heads, "random": self.random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        self.masters.restore(state)
        with torch.no_grad():
            for head, saved in zip((self.proxies, self.log_scale), state["heads"], strict=True):
                head.copy_(saved)
        self.random.bit_generator.state = state["random"]

    def write(self, out: Path) -> None:
        """Write a checkpoint folder."""
        weights = {name: weight.detach() for name, weight in self.model.state_dict().items()}
        write_checkpoint(
            out,
            self.model.config,
            self.tokenizer,
            dtype="bfloat16",
            max_pixels=MAX_PIXELS,
            state_dict=weights,
            is_reranker=True,
            stored_dtype=stored_dtype,
        )

    def _drawing(self, target: int, size: tuple[int, int]) -> Example:
        if target >= self.examples.captions.num_drawings:
            return self.examples.swatch(target - self.examples.captions.num_drawings, size)
        having = [style for style, drawings in self.examples.styles.items() if target in drawings.place]
        return self.examples.drawn(str(self.random.choice(having)), target, PICTURES, size)

    def _text(self, target: int) -> Example:
        return Example([], target, *self.examples.captions.text_for(target, self.random))


@dataclass(frozen=True)
class Side:
    """The queries or the documents of a batch. A query with an image means only that drawing."""

    part: pairs.Part
    examples: list[Example]
    kind: str
    texts: list[str]
    size: tuple[int, int]  # of the images, height and width in pixels


def logistic_fit(values: Tensor, right: Tensor) -> tuple[float, float]:
    """The scale and threshold with which sigmoid(scale * (value - threshold)) fits `right` best.

    The right ones count as much as all others, so that 0.5 separates them.
    """
    scale = torch.tensor(10.0 / float(values.std()), requires_grad=True)
    threshold = torch.tensor(float(values[right].mean() + values[~right].mean()) / 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, threshold], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_odds = scale * (values - threshold)
        total = F.softplus(-log_odds[right]).mean() + F.softplus(log_odds[~right]).mean()
        total.backward()
        return total

    optimizer.step(loss)
    return float(scale.detach()), float(threshold.detach())


def positives(queries: Side, documents: Side) -> Tensor:
    """Whether each query means each document, (num_queries, num_documents) bool."""
    return torch.tensor([[found.target in asked.meaning for found in documents.examples] for asked in queries.examples])


def reranker_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """The embedder's tokenizer, which adds no last token: a prompt of the reranker ends with the template's."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def nearest_of(proxies: Tensor) -> np.ndarray:
    """(num_proxies, CONFUSED_WITH): the most similar others."""
    unit = F.normalize(proxies, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-1).topk(CONFUSED_WITH, dim=1).indices.numpy()


def empty_loss(at_query: Tensor, at_document: Tensor) -> Tensor:
    return sum(states[..., OTHERS].square().sum(-1).mean() / LENGTH**2 for states in (at_query, at_document))


@torch.no_grad()
def report(training: RerankerTraining, num_queries: int = 300) -> None:
    """Print R@1 of names among the trunk's first 20 drawings, before and after, as a check before the evaluation."""
    for style in ("noto", HELD_OUT_STYLE):
        drawings = training.examples.watched[style]
        rows = sorted(drawings.place)
        frames = [pictures.plain_picture(drawings, row, (96, 96)) for row in rows]
        names = [training.examples.captions.names[row] for row in rows]
        asked = F.normalize(text_vectors_of(training.examples, names)[:, VECTOR], dim=-1)
        found = F.normalize(picture_vectors_of(training.examples, frames)[:, VECTOR], dim=-1)
        first = (asked @ found.T).topk(20, dim=1).indices
        before = after = 0
        asked_rows = range(0, len(rows), max(1, len(rows) // num_queries))
        for row in asked_rows:
            query = pairs.part_of(training.tokenizer, [names[row]], pairs.AFTER_QUERY)
            features = forward.see(training.model, to_pixels([frames[place] for place in first[row]]))
            documents = pairs.part_of(training.tokenizer, [""] * 20, TAIL, (96, 96), features)
            scores = pairs.Scored(
                training.model, training.tokenizer, training.common_ids(), query, documents
            ).log_odds()
            before += int(first[row, 0]) == row
            after += int(first[row, scores[0].argmax()]) == row
        num = len(asked_rows)
        print(
            json.dumps({"style": style, "queries": num, "trunk R@1": before / num, "reranked R@1": after / num}),
            flush=True,
        )


def train_trunk(data: Path, run: Path, seed: int) -> None:
    """Continue the training of the bundled embedder. RUN/trunk is the mean of the ends of the last stages and, with the
    same weight as all of them, of the embedder itself."""
    training = Training(data, run, seed, EMBEDDER)
    begun = training.masters.copy()
    ends = [run_stage(training, f"trunk-{place}", TRUNK, run) for place in range(NUM_TRUNK_STAGES)]
    training.masters.average([begun] * NUM_AVERAGED + ends[-NUM_AVERAGED:])
    training.write(run / "trunk")


def after_states(data: Path, run: Path, seed: int, start: Path | None) -> RerankerTraining:
    """The training after the first two stages."""
    if not (run / "trunk").exists():
        train_trunk(data, run, seed)
    training = RerankerTraining(data, run, run / "trunk", seed, start)
    for place, stage in enumerate(STATES if start is None else ()):
        run_steps(training, f"states-{place}", stage, run)
    return training


def main() -> None:
    start = "reranker whose language model is trained further; default: all stages"
    chosen = parse_options("Train the bundled reranker.", run="reranker", out=OUT, start=start, seed=1)
    training = after_states(chosen.data, chosen.run, chosen.seed, chosen.start)
    for place in range(NUM_VECTOR_STAGES):
        begun = training.masters.copy()
        training.masters.average([begun, run_steps(training, f"vectors-{place}", VECTORS, chosen.run)])
    training.calibrate()
    report(training)
    training.write(chosen.out)


if __name__ == "__main__":
    main()
