"""Train the bundled model.

`python -m training.train [--data FOLDER] [--run FOLDER] [--out FOLDER] [--start FOLDER] [--threads N]`. The training is
seeded, saves its state every SAVE_EVERY steps and resumes from it. Weights and gradients are bfloat16 with float32
master copies, which is three times as fast as float32 on a CPU with AMX.

Every drawing and every color has a learned vector, its proxy, which is discarded at the end. The losses are a softmax
over all proxies for images and for texts (a keyword has several correct ones), and InfoNCE between the images and texts
of a batch. Each is computed at the full size and at one smaller Matryoshka size, drawn in each step. In the last stage,
the smaller size also learns to rank everything as the full size does (distillation).
"""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3VLModel

from benchmarks.random_checkpoint import build_tokenizer, shape_config, write_checkpoint
from training import data as pictures
from training import forward
from training.data import COLOR_NAMES, COLORS, SHAPES
from training.prepare import DEFAULT_DATA, HELD_OUT_STYLE, TRAINED_STYLES
from training.prompt import DEFAULT_INSTRUCTION, INSTRUCTIONS, prefix_ids, text_tokens, visual_tokens

OUT = Path(__file__).parents[1] / "embedder" / "default_model"
VOCAB_SIZE = 6144
MATRYOSHKA = (32, 64, 128, 192)
MAX_AREA = 224 * 224  # the largest training image; the checkpoint's longest_edge
SAVE_EVERY = 200
MUON_FACTOR = 2.5  # Muon's learning rate over AdamW's
MAX_LOG_SCALE = math.log(80)

# Image sizes and their shares: mostly small ones, because they are cheap, but every size and shape below MAX_AREA.
SIZES = {
    (64, 64): 0.14,
    (96, 96): 0.24,
    (128, 128): 0.24,
    (160, 160): 0.08,
    (192, 192): 0.06,
    (224, 224): 0.08,
    (64, 128): 0.04,
    (128, 64): 0.04,
    (96, 160): 0.02,
    (160, 96): 0.02,
    (128, 256): 0.02,
    (256, 128): 0.02,
}


@dataclass(frozen=True)
class Stage:
    """The parameters of one training stage.

    `patches`: patches per step, so the batch size depends on the image size. `swatches`, `shapes`: their shares of the
    images; the rest are drawings. `clips`, `pairs`: shares of the steps with clips, and with images that have a text.
    """

    steps: int
    learning_rate: float
    patches: int
    sizes: dict[tuple[int, int], float]
    swatches: float
    shapes: float
    texts: int = 192  # per step: those of the images, then of random drawings and colors
    strength: float = 1.0  # of the augmentation
    last_rate: float = 0.02  # cosine schedule down to this share of the learning rate
    clips: float = 0.0
    pairs: float = 0.0
    with_language: bool = True  # False: trains only the vision tower, with the mean of its outputs
    late_keywords: bool = False  # False: no keyword that is held out from any drawing is used
    smaller: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)  # probabilities of the smaller Matryoshka sizes
    imitation: float = 0.0  # weight of the distillation loss
    loose_texts: int = 0  # random words without a meaning, for the distillation loss
    mixed: float = 0.0  # share of the drawings that are mixed of two styles


MOSTLY_SMALL = {size: share * (1.0 if max(size) <= 128 else 0.4) for size, share in SIZES.items()}
SMALL = {(64, 64): 0.3, (96, 96): 0.4, (128, 128): 0.2, (64, 128): 0.05, (128, 64): 0.05}
STAGES = {
    "towers": Stage(600, 6e-4, 5120, SMALL, swatches=0.1, shapes=0.0, strength=0.5, last_rate=0.6, with_language=False),
    "joint": Stage(
        2600, 6e-4, 3072, MOSTLY_SMALL, swatches=0.1, shapes=0.04, strength=0.6, last_rate=0.5, clips=0.06, pairs=0.06
    ),
    "finish": Stage(1400, 3e-4, 3072, SIZES, swatches=0.15, shapes=0.04, strength=0.4, clips=0.08, pairs=0.08),
    "late": Stage(
        2400,
        5e-4,
        3072,
        MOSTLY_SMALL,
        swatches=0.12,
        shapes=0.04,
        strength=0.5,
        clips=0.08,
        pairs=0.08,
        late_keywords=True,
        smaller=(0.15, 0.7, 0.15),
    ),
    "last": Stage(
        1200,
        4e-4,
        3072,
        MOSTLY_SMALL,
        swatches=0.1,
        shapes=0.03,
        texts=320,
        strength=0.5,
        clips=0.06,
        pairs=0.06,
        late_keywords=True,
        smaller=(0.1, 0.8, 0.1),
    ),
    "again": Stage(
        1200,
        4e-4,
        3072,
        MOSTLY_SMALL,
        swatches=0.08,
        shapes=0.03,
        texts=320,
        strength=0.7,
        clips=0.05,
        pairs=0.05,
        late_keywords=True,
        smaller=(0.08, 0.86, 0.06),
    ),
}
AVERAGED = ("late", "last", "again")  # the stages that end with a low learning rate
DISTILLATION = Stage(
    1500,
    3e-4,
    3072,
    MOSTLY_SMALL,
    swatches=0.08,
    shapes=0.03,
    texts=256,
    strength=0.8,
    clips=0.05,
    pairs=0.05,
    late_keywords=True,
    smaller=(0.1, 0.8, 0.1),
    imitation=2.0,
    loose_texts=96,
)
IMITATED_SCALE = 20.0  # of cosines; low, so that the order of all items matters
# The most common queries, sampled more often than the other 938 colors.
BASIC = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey")
BASIC_COLORS = [COLOR_NAMES.index(name) for name in BASIC]
# Names of drawings that must not be mirrored: a direction or writing would change.
SIDED = re.compile("left|right|arrow|clock|button|mark|sign|symbol|input|keycap|letter|flag|play|moon|hand|fist")

WORDS = re.compile(r"[a-z0-9'-]+")

Choice = TypeVar("Choice")


class Captions:
    """The training texts and the proxies that each of them means.

    Without `late`, keywords that are held out from any drawing are not used at all.
    """

    def __init__(self, folder: Path, late: bool = False) -> None:
        self.captions = pictures.read_captions(folder)
        self.names = [caption["name"] for caption in self.captions]
        self.keywords = [caption["keywords"] + caption["late_keywords"] * late for caption in self.captions]
        self.num_drawings = len(self.captions)
        self.num_proxies = self.num_drawings + len(COLORS)
        held_out = [{*c["held_out_keywords"], *([] if late else c["late_keywords"])} for c in self.captions]
        self.held_out = set().union(*held_out)
        self.meanings: dict[str, set[int]] = defaultdict(set)
        for row, name in enumerate(self.names):
            words = {word for word in _words_of(name) if len(word) > 2 and not (late and word in held_out[row])}
            for text in (name.lower(), *self.keywords[row], *words):
                self.meanings[text].add(row)
        for color, name in enumerate(COLOR_NAMES):
            same = (COLORS[color] == COLORS).all(1).nonzero()[0]
            self.meanings[name].update(int(other) + self.num_drawings for other in same)
        if not late:
            for word in self.held_out - {name.lower() for name in self.names} - set(COLOR_NAMES):
                self.meanings.pop(word, None)
        self.drawings_by_word: dict[str, set[int]] = defaultdict(set)
        self.phrase_words: list[list[str]] = []
        for row, name in enumerate(self.names):
            words = sorted({word for text in (name.lower(), *self.keywords[row]) for word in WORDS.findall(text)})
            self.phrase_words.append(words)
            for word in words:
                self.drawings_by_word[word].add(row)
        self.all_words = sorted(self.drawings_by_word)
        self.may_be_mirrored = [not SIDED.search(name.lower()) for name in self.names]
        self.words = [
            [word for word in _words_of(name) if row in self.meanings.get(word, ())]
            for row, name in enumerate(self.names)
        ]

    def every_text(self) -> list[str]:
        prompts = [DEFAULT_INSTRUCTION, *INSTRUCTIONS, "system user assistant", "<0.1 seconds>"]
        return [
            *prompts,
            *self.names,
            *self.meanings,
            *(f"{name} {shape}" for name in COLOR_NAMES for shape in SHAPES),
        ]

    def text_for(self, proxy: int, random: Generator) -> tuple[str, set[int]]:
        """A random text for the drawing or color, and all proxies that it means."""
        if proxy >= self.num_drawings:
            text = COLOR_NAMES[proxy - self.num_drawings]
            return _varied(text, random), self.meanings[text]
        chance = random.random()
        if chance < 0.15 and len(self.phrase_words[proxy]) > 1:
            return self.phrase_for(proxy, random)
        choices = self.keywords[proxy] if chance < 0.5 else self.words[proxy] if chance < 0.6 else []
        text = choices[random.integers(len(choices))] if choices else self.names[proxy]
        return _varied(text, random), self.meanings[text.lower()]

    def phrase_for(self, drawing: int, random: Generator) -> tuple[str, set[int]]:
        """Two words of the name and keywords in random order, and all drawings that have both."""
        one, other = random.choice(self.phrase_words[drawing], 2, replace=False)
        if f"{one} {other}" in self.held_out:
            one, other = other, one
        return f"{one} {other}", self.drawings_by_word[one] & self.drawings_by_word[other]

    def loose_text(self, random: Generator) -> str:
        """One to three random words."""
        words = random.choice(self.all_words, random.integers(1, 4))
        return " ".join(words)

    def another_text(self, example: "Example", random: Generator) -> str:
        """A text to combine with the example's image in one item; it may differ from the text to find."""
        return self.text_for(example.target, random)[0] if example.target < self.num_proxies else example.text


def _words_of(name: str) -> list[str]:
    return name.lower().replace(":", " ").replace(",", " ").split()


def _varied(text: str, random: Generator) -> str:
    """The text, sometimes capitalized or in a phrase, as people type it."""
    chance = random.random()
    if chance < 0.8:
        return text
    if chance < 0.9:
        return text.capitalize()
    phrases = ("a {}", "{} emoji", "a picture of {}", "a drawing of a {}", "{}.", "show me {}")
    return phrases[random.integers(len(phrases))].format(text)


@dataclass(frozen=True)
class Example:
    frames: list[np.ndarray]  # one image, or the four frames of a clip
    target: int  # index of its proxy
    text: str
    meaning: set[int]  # all proxies that the text means


class Masters:
    """The float32 master copies of a model's bfloat16 weights, and their optimizers.

    `heads`: float32 parameters outside the model, with the factor of their learning rate. `round_`: changes a weight in
    place to the value that the checkpoint's format can hold.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: dict[nn.Parameter, float],
        round_: Callable[[str, Tensor], None] = lambda name, weight: None,
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        self.round_ = round_
        named = list(zip(self.names, self.masters, strict=True))
        matrices = [master for name, master in named if master.dim() == 2 and "embed" not in name]
        tokens = [master for name, master in named if "embed_tokens" in name]
        others = [
            master for name, master in named if "embed_tokens" not in name and (master.dim() != 2 or "embed" in name)
        ]
        muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam_groups: list[dict[str, Any]] = [
            {"params": others, "factor": 1.0},
            {"params": tokens, "factor": 4.0},  # because most tokens are rare
            *({"params": [head], "factor": factor} for head, factor in heads.items()),
        ]
        adam = torch.optim.AdamW(adam_groups, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [muon, adam]

    def update(self, learning_rate: float) -> None:
        """Apply the gradients of the weights and heads, and clear them."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("factor", MUON_FACTOR)
            optimizer.step()
            optimizer.zero_grad()
        self._copy()

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def copy(self) -> dict[str, Any]:
        """A state for `average`."""
        return {"masters": [master.clone() for master in self.masters]}

    def restore(self, state: dict[str, Any]) -> None:
        self._set(state["masters"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def average(self, states: list[dict[str, Any]]) -> None:
        """Set the weights to the mean of these states, which is better than each one (model soups, Wortsman 2022)."""
        self._set([torch.stack(same).mean(0) for same in zip(*(state["masters"] for state in states), strict=True)])

    @torch.no_grad()
    def read(self) -> None:
        """Take over weights that were set in the model."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.copy_(weight)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(value)
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for name, master, weight in zip(self.names, self.masters, self.weights, strict=True):
            weight.copy_(master)
            self.round_(name, weight)


class Training:
    """Weights, proxies and optimizers; `step` makes one update."""

    def __init__(self, folder: Path, run: Path, seed: int, start: Path | None = None) -> None:
        """`start`: a checkpoint to continue from, whose image vectors initialize the proxies. None: random weights."""
        torch.manual_seed(seed)
        self.random = np.random.default_rng(seed)
        self.folder = folder
        self.captions = Captions(folder)
        self.styles = {style: pictures.read_drawings(folder, style) for style in TRAINED_STYLES}
        self.watched = {"noto": self.styles["noto"], HELD_OUT_STYLE: pictures.read_drawings(folder, HELD_OUT_STYLE)}
        self.drawings = [(style, row) for style, drawings in self.styles.items() for row in drawings.place]
        self.queue: list[int] = []
        scale = 16.0 if start is None else 35.0
        if start is None:
            self.tokenizer = build_tokenizer(self.captions.every_text(), VOCAB_SIZE)
            self.config = shape_config("tiny", self.tokenizer)
            start = run / "start"
            write_checkpoint(start, self.config, self.tokenizer, seed=seed, dtype="bfloat16")
            self.model = Qwen3VLModel.from_pretrained(start, dtype=torch.bfloat16)
            initialize_weights(
                self.model, np.concatenate([self.styles[style].small for style in TRAINED_STYLES]), self.random
            )
            self.proxies = nn.Parameter(start_proxies(self.styles, self.captions.num_drawings))
        else:
            self.tokenizer = Qwen2Tokenizer.from_pretrained(start)
            self.model = Qwen3VLModel.from_pretrained(start, dtype=torch.bfloat16)
            self.config = self.model.config
            self.proxies = nn.Parameter(proxies_from_checkpoint(self))
        self.log_scale = nn.Parameter(torch.full((len(MATRYOSHKA),), math.log(scale)))
        self.prefixes: dict[str, Tensor] = {}
        self.masters = Masters(self.model, {self.proxies: 4.0, self.log_scale: 2.0})

    def step(self, stage: Stage, learning_rate: float) -> dict[str, float]:
        """Make one update and return the losses by name."""
        losses = self.losses(stage)
        sum(losses.values()).backward()
        self.masters.update(learning_rate)
        with torch.no_grad():
            self.log_scale.clamp_(max=MAX_LOG_SCALE)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def losses(self, stage: Stage) -> dict[str, Tensor]:
        random = self.random
        kind = random.choice(("picture", "clip", "pair"), p=(1 - stage.clips - stage.pairs, stage.clips, stage.pairs))
        sizes = {size: share for size, share in stage.sizes.items() if kind != "clip" or size in SMALL}
        size = drawn_from(sizes, random)
        patches = size[0] // 16 * (size[1] // 16) * (2 if kind == "clip" else 1)
        examples = [self.example(stage, size, 4 if kind == "clip" else 1) for _ in range(stage.patches // patches)]
        features = self.see([example.frames for example in examples])
        self.directions = [(size, F.normalize(self.proxies[:, :size]), scale) for size, scale in self.matryoshka(stage)]
        targets = self.shares([{example.target} for example in examples])
        paired = examples[: stage.texts]
        more = random.integers(self.captions.num_proxies, size=stage.texts - len(paired))
        texts = [(e.text, e.meaning) for e in paired] + [self.captions.text_for(int(proxy), random) for proxy in more]
        prefix_ids, prefix = self.prefix()
        texts += [(self.captions.loose_text(random), set()) for _ in range(stage.loose_texts)]
        tokens = text_tokens(self.tokenizer, [text for text, _ in texts], len(prefix_ids))
        text_vectors = forward.read(self.model, prefix, tokens.input_ids, tokens.lengths, tokens.position_ids)
        losses = {
            "vision": self.proxy_loss(features.pooled().float(), targets) * (0.3 if stage.with_language else 1),
            "text": self.proxy_loss(text_vectors, self.shares([meaning for _, meaning in texts])),
        }
        if stage.with_language:
            prefix_ids, prefix = self.prefix()
            tokens = visual_tokens(
                self.tokenizer,
                self.model,
                prefix_ids,
                len(examples),
                size,
                timestamps=self.timestamps() if kind == "clip" else None,
                texts=[self.captions.another_text(e, random) for e in examples] if kind == "pair" else None,
            )
            vectors = forward.read(
                self.model, prefix, tokens.input_ids, tokens.lengths, tokens.position_ids, tokens.visual_at, features
            )
            losses["picture"] = self.proxy_loss(vectors, targets)
            positive = torch.tensor([[picture.target in text.meaning for text in paired] for picture in paired])
            losses["pairs"] = self.pair_loss(vectors[: len(paired)], text_vectors[: len(paired)], positive)
            if stage.imitation:
                found = ((text_vectors, vectors), (text_vectors, self.proxies), (vectors, self.proxies))
                losses["imitation"] = stage.imitation * sum(self.imitation_loss(*one) for one in found)
        return losses

    def see(self, frames: list[list[np.ndarray]]) -> forward.VisualFeatures:
        """Run the vision tower on items of 1 or 4 frames. The tokens of a clip's two frame pairs are concatenated."""
        if len(frames[0]) == 1:
            return forward.see(self.model, to_pixels([item[0] for item in frames]))
        moments = [to_pixels([item[place] for item in frames]) for place in range(4)]
        early, late = (forward.see(self.model, moments[place], moments[place + 1]) for place in (0, 2))
        deepstack = [torch.cat(both, dim=1) for both in zip(early.deepstack, late.deepstack, strict=True)]
        return forward.VisualFeatures(torch.cat((early.tokens, late.tokens), dim=1), deepstack)

    def timestamps(self) -> list[float]:
        """The timestamps of two frame pairs at a random frame rate: the mean time of each pair."""
        frames_per_second = float(self.random.choice((1, 2, 2, 4, 24)))
        return [0.5 / frames_per_second, 2.5 / frames_per_second]

    def example(self, stage: Stage, size: tuple[int, int], num_frames: int) -> Example:
        """The next drawing, or a swatch or a shape. A shape has no proxy; its target is a number above all proxies."""
        random, captions = self.random, self.captions
        chance = random.random()
        if chance < stage.swatches:
            basic = random.random() < 0.2
            return self.swatch(
                int(random.choice(BASIC_COLORS)) if basic else int(random.integers(len(COLORS))), size, num_frames
            )
        if chance < stage.swatches + stage.shapes:
            color, shape = int(random.integers(len(COLORS))), int(random.integers(len(SHAPES)))
            target = captions.num_proxies + color * len(SHAPES) + shape
            frames = [pictures.shape_picture(color, SHAPES[shape], size, random)] * num_frames
            return Example(frames, target, f"{COLOR_NAMES[color]} {SHAPES[shape]}", {target})
        if not self.queue:
            self.queue = list(random.permutation(len(self.drawings)))
        return self.drawn(*self.drawings[self.queue.pop()], stage, size, num_frames)

    def swatch(self, color: int, size: tuple[int, int], num_frames: int = 1) -> Example:
        target = self.captions.num_drawings + color
        frames = [pictures.swatch(color, size)] * num_frames
        return Example(frames, target, *self.captions.text_for(target, self.random))

    def drawn(self, style: str, row: int, stage: Stage, size: tuple[int, int], num_frames: int = 1) -> Example:
        """One drawing with augmentation."""
        random, captions = self.random, self.captions
        mirrored = captions.may_be_mirrored[row] and random.random() < 0.25 * stage.strength
        drawing = pictures.drawing_for(self.styles[style], row, size)
        if stage.mixed and random.random() < stage.mixed:
            others = [drawings for drawings in self.styles.values() if row in drawings.place]
            other = others[random.integers(len(others))]
            drawing = pictures.mixed(drawing, pictures.drawing_for(other, row, size), random)
        frames = pictures.varied_frames(drawing, size, random, stage.strength, num_frames, mirrored)
        return Example(frames, row, *captions.text_for(row, random))

    def prefix(self) -> tuple[Tensor, forward.Prefix]:
        """The ids, keys and values of the system prompt, mostly with the default instruction."""
        instruction = DEFAULT_INSTRUCTION
        if self.random.random() < 0.3:
            instruction = INSTRUCTIONS[self.random.integers(len(INSTRUCTIONS))]
        if instruction not in self.prefixes:
            self.prefixes[instruction] = prefix_ids(self.tokenizer, instruction)
        ids = self.prefixes[instruction]
        return ids, forward.read_prefix(self.model, ids)

    def shares(self, meanings: list[set[int]]) -> Tensor:
        """Target distributions (num_items, num_proxies): equal shares for all proxies of an item, none for shapes."""
        targets = torch.zeros(len(meanings), self.captions.num_proxies)
        for row, meaning in enumerate(meanings):
            right = [proxy for proxy in meaning if proxy < self.captions.num_proxies]
            targets[row, right] = 1 / max(1, len(right))
        return targets

    def proxy_loss(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with `targets` (num_items, num_proxies), over the items that have a proxy."""
        total = torch.zeros(())
        for size, directions, scale in self.directions:
            logits = F.normalize(vectors[:, :size], dim=-1) @ directions.T * scale
            total = total - (targets * F.log_softmax(logits, dim=-1)).sum()
        return total / 2 / targets.sum()

    def pair_loss(self, vectors: Tensor, text_vectors: Tensor, positive: Tensor) -> Tensor:
        """InfoNCE in both directions; a text that means several images has several positives."""
        total = torch.zeros(())
        for size, _, scale in self.directions:
            logits = similarities(vectors, text_vectors, size) * scale
            total = total + (softmax_loss(logits, positive) + softmax_loss(logits.T, positive.T)) / 2
        return total / 2

    def imitation_loss(self, rows: Tensor, columns: Tensor) -> Tensor:
        """KL divergence of the smaller size from the full size, over the similarities of each row to all columns."""
        (smaller, _, _), (full, _, _) = self.directions
        taught = similarities(rows, columns, full).detach()
        return divergence(similarities(rows, columns, smaller) * IMITATED_SCALE, taught * IMITATED_SCALE)

    def matryoshka(self, stage: Stage) -> list[tuple[int, Tensor]]:
        """A random smaller size and the full size, with their learned scales. All four would cost twice as much."""
        smaller = int(self.random.choice(len(stage.smaller), p=stage.smaller))
        return [(MATRYOSHKA[place], self.log_scale[place].exp()) for place in (smaller, -1)]

    def state(self) -> dict[str, Any]:
        return {
            **self.masters.state(),
            "heads": [self.proxies.data, self.log_scale.data],
            "random": self.random.bit_generator.state,
            "queue": self.queue,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.masters.restore(state)
        with torch.no_grad():
            for head, saved in zip((self.proxies, self.log_scale), state["heads"], strict=True):
                head.copy_(saved)
        self.random.bit_generator.state = state["random"]
        self.queue = state["queue"]

    def write(self, out: Path) -> None:
        """Write a checkpoint folder with the bfloat16 weights."""
        weights = {name: weight.detach() for name, weight in self.model.state_dict().items()}
        write_checkpoint(out, self.config, self.tokenizer, dtype="bfloat16", max_pixels=MAX_AREA, state_dict=weights)


def drawn_from(shares: Mapping[Choice, float], random: Generator) -> Choice:
    """A random key; `shares` need not add up to 1."""
    values = np.array(list(shares.values()))
    return list(shares)[random.choice(len(values), p=values / values.sum())]


def softmax_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy of the rows that have a positive column, with equal shares for all of them."""
    asked = positive.any(1)
    shares = positive[asked] / positive[asked].sum(1, keepdim=True)
    return -(shares * F.log_softmax(logits[asked], dim=1)).sum(1).mean()


def divergence(logits: Tensor, taught: Tensor) -> Tensor:
    """KL divergence of each row's softmax from the one that is taught."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(taught, dim=1), reduction="batchmean")


def similarities(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    return F.normalize(rows[:, :size], dim=-1) @ F.normalize(columns[:, :size], dim=-1).T


def to_pixels(frames: list[np.ndarray]) -> Tensor:
    """Stack to (num_frames, 3, height, width) in -1..1, the processor's normalization."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def initialize_weights(model: Qwen3VLModel, drawings: np.ndarray, random: Generator) -> None:
    """Initialize norms to 1, biases to 0, and the patch embedding to a whitening of image patches.

    The rows of the patch embedding are the 160 strongest principal components of random 16x16 patches on white, scaled
    to equal variance. `drawings`: (num_drawings, side, side, 4), premultiplied.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    weight = model.visual.patch_embed.proj.weight  # (hidden_size, 3, 2, 16, 16)
    patches = np.empty((20_000, 16, 16, 3), np.float32)
    for place in range(len(patches)):
        row, top, left = random.integers((len(drawings), *[drawings.shape[1] - 16] * 2))
        patch = drawings[row, top : top + 16, left : left + 16].astype(np.float32)
        patches[place] = (patch[..., :3] + 255 - patch[..., 3:]) / 127.5 - 1
    flat = torch.from_numpy(patches).permute(0, 3, 1, 2).flatten(1)  # (num_patches, 768)
    spread, directions = torch.linalg.eigh(torch.cov(flat.T))
    strongest = directions[:, -weight.shape[0] :] / (spread[-weight.shape[0] :] + 0.05).sqrt()
    weight.copy_(
        (strongest.T / 4).unflatten(1, (3, 1, 16, 16)).expand_as(weight)
    )  # half for each of two frames, at 0.5


def start_proxies(styles: dict[str, pictures.Drawings], num_drawings: int) -> Tensor:
    """Initial proxies (num_proxies, hidden_size): random Fourier features, so similar images have similar proxies.

    With random directions, the vision tower stayed near chance for hundreds of steps. The features of a drawing are the
    strongest principal components of its 8x8 image, averaged over styles; those of a color are its RGB values.
    """
    width = MATRYOSHKA[-1]
    coarse = torch.zeros(num_drawings, 4 * 8 * 8)
    count = torch.zeros(num_drawings, 1)
    for drawings in styles.values():
        rows = torch.tensor(list(drawings.place))
        tiles = torch.from_numpy(drawings.small).permute(0, 3, 1, 2)
        for chunk, places in zip(tiles.split(256), rows.split(256), strict=True):
            coarse[places] += F.adaptive_avg_pool2d(chunk.float() / 255, 8).flatten(1)
            count[places] += 1
    coarse = coarse / count
    components, spread, _ = torch.linalg.svd(coarse - coarse.mean(0), full_matrices=False)
    looks = components[:, :40] * spread[:40].sqrt()  # half whitened, so that fine differences have more weight
    nearest = torch.cdist(looks, looks).fill_diagonal_(torch.inf).min(1).values.median()
    colors = torch.from_numpy(COLORS / 255.0).float() * 8
    return torch.cat(
        [
            torch.cos(described @ torch.randn(described.shape[1], width) + torch.rand(width) * 2 * math.pi)
            for described in (looks / nearest, colors)
        ]
    )


@torch.no_grad()
def text_vectors_of(training: Training, texts: list[str]) -> Tensor:
    """(num_texts, hidden_size), with the default instruction."""
    ids = prefix_ids(training.tokenizer, DEFAULT_INSTRUCTION)
    tokens = text_tokens(training.tokenizer, texts, len(ids))
    prefix = forward.read_prefix(training.model, ids)
    return forward.read(training.model, prefix, tokens.input_ids, tokens.lengths, tokens.position_ids)


@torch.no_grad()
def picture_vectors_of(training: Training, frames: list[np.ndarray]) -> Tensor:
    """(num_images, hidden_size), for images of one size, with the default instruction."""
    vectors = []
    for start in range(0, len(frames), 128):
        seen = frames[start : start + 128]
        features = forward.see(training.model, to_pixels(seen))
        vectors.append(feature_vectors_of(training, features, (seen[0].shape[0], seen[0].shape[1])))
    return torch.cat(vectors)


@torch.no_grad()
def feature_vectors_of(
    training: Training, features: forward.VisualFeatures, size: tuple[int, int], texts: list[str] | None = None
) -> Tensor:
    """As `picture_vectors_of`, from the outputs of the vision tower. `texts`: one for each image."""
    ids = prefix_ids(training.tokenizer, DEFAULT_INSTRUCTION)
    prefix = forward.read_prefix(training.model, ids)
    tokens = visual_tokens(training.tokenizer, training.model, ids, len(features.tokens), size, texts=texts)
    read = (tokens.input_ids, tokens.lengths, tokens.position_ids, tokens.visual_at)
    return forward.read(training.model, prefix, *read, features)


def drawing_vectors(training: Training, drawings: pictures.Drawings) -> Tensor:
    """(num_drawings, hidden_size) of one style at 96x96, in the order of the captions, without augmentation."""
    rows = sorted(drawings.place)
    return picture_vectors_of(training, [pictures.plain_picture(drawings, row, (96, 96)) for row in rows])


def swatch_vectors(training: Training) -> Tensor:
    """(num_colors, hidden_size), at 64x64."""
    return picture_vectors_of(training, [pictures.swatch(color, (64, 64)) for color in range(len(COLORS))])


def proxies_from_checkpoint(training: Training) -> Tensor:
    """Proxies (num_proxies, hidden_size) from a checkpoint's vectors of drawings (mean over styles) and swatches."""
    totals = torch.zeros(training.captions.num_drawings, MATRYOSHKA[-1])
    for drawings in training.styles.values():
        totals[sorted(drawings.place)] += F.normalize(drawing_vectors(training, drawings), dim=-1)
    return torch.cat((F.normalize(totals, dim=-1), F.normalize(swatch_vectors(training), dim=-1)))


def recall(texts: Tensor, found: Tensor, right: Tensor, at: int, size: int) -> float:
    """Recall at `at` with `size` dimensions. `right`: (num_texts, num_found) bool."""
    first = similarities(texts, found, size).topk(at, dim=1).indices
    return float(right.gather(1, first).any(1).float().mean())


class Trainable(Protocol):
    """What `run_steps` trains. `step` makes one update and returns the losses by name."""

    def step(self, stage: Any, learning_rate: float) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def run_stage(training: Training, name: str, stage: Stage, run: Path) -> dict[str, Any]:
    """As `run_steps`, with the texts of the stage."""
    training.captions = Captions(training.folder, stage.late_keywords)
    return run_steps(training, name, stage, run)


def run_steps(training: Trainable, name: str, stage: Any, run: Path) -> dict[str, Any]:
    """Run one stage, or what is left of it, and return its last state.

    `stage`: with `steps`, `learning_rate` and `last_rate`. RUN/NAME.pt has the state of the last SAVE_EVERY steps.
    """
    file = run / f"{name}.pt"
    step = 0
    if file.exists():
        saved = torch.load(file, weights_only=False)
        training.restore(saved["state"])
        step = saved["step"]
    bar = tqdm(range(step, stage.steps), initial=step, total=stage.steps, desc=name, mininterval=10)
    smooth: dict[str, float] = {}
    for step in bar:
        warm = min(1.0, (step + 1) / 50)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / stage.steps)
        losses = training.step(stage, stage.learning_rate * warm * (stage.last_rate + (1 - stage.last_rate) * cosine))
        smooth = {key: 0.98 * smooth.get(key, value) + 0.02 * value for key, value in losses.items()}
        bar.set_postfix({key: f"{value:.2f}" for key, value in smooth.items()}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            torch.save({"state": training.state(), "step": step + 1}, file)
            tqdm.write(json.dumps({"stage": name, "step": step + 1, **smooth}))
    state: dict[str, Any] = torch.load(file, weights_only=False)["state"]
    return state


def report(training: Training) -> None:
    """Print recall of bfloat16 vectors at the full size and at 64, as a quick check before `training.evaluate`."""
    colors = torch.from_numpy(COLORS.astype(np.int64))
    asked = {
        "color": (
            text_vectors_of(training, list(COLOR_NAMES)),
            swatch_vectors(training),
            (colors[:, None] == colors[None]).all(-1),
        )
    }
    for style in ("noto", HELD_OUT_STYLE):
        drawings = training.watched[style]
        rows = sorted(drawings.place)
        names = text_vectors_of(training, [training.captions.names[row] for row in rows])
        asked[style] = (names, drawing_vectors(training, drawings), torch.eye(len(rows), dtype=torch.bool))
    print(
        json.dumps(
            {
                f"{what} R@{at} of {size}": round(recall(*one, at, size), 3)
                for what, one in asked.items()
                for at in (1, 5)
                for size in (64, MATRYOSHKA[-1])
            }
        )
    )


def parse_options(description: str, *, run: str, out: Path, start: str, seed: int) -> argparse.Namespace:
    """The options of a training; sets torch's threads and creates the folder for saved states.

    `run`: the name of that folder, `start`: what --start is for; `out` and `seed` are defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--run", type=Path, help=f"folder for saved states; default: DATA/{run}")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--start", type=Path, help=start)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.run = chosen.run or chosen.data / run
    chosen.run.mkdir(parents=True, exist_ok=True)
    return chosen


def main() -> None:
    start_help = "checkpoint to distill; default: it is trained first"
    chosen = parse_options("Train the bundled model.", run="run", out=OUT, start=start_help, seed=0)
    run: Path = chosen.run
    start: Path = chosen.start or run / "mean"
    if not start.exists():
        train_from_scratch(chosen.data, run, chosen.seed).write(start)
    training = Training(chosen.data, run, chosen.seed, start)
    begun = training.masters.copy()
    report(training)
    training.masters.average([begun, run_stage(training, "distillation", DISTILLATION, run)])
    training.write(chosen.out)
    report(training)


def train_from_scratch(data: Path, run: Path, seed: int) -> Training:
    training = Training(data, run, seed)
    ends = {name: run_stage(training, name, stage, run) for name, stage in STAGES.items()}
    training.masters.average([ends[name] for name in AVERAGED])
    return training


if __name__ == "__main__":
    main()
