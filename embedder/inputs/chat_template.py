"""The checkpoint's chat template, compared with the prompt that this service builds.

transformers renders the template for each input; this service tokenizes its own pieces (`prompt`). A checkpoint that
was trained with another prompt is refused, because each of its vectors would be wrong.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from embedder.errors import ModelUnavailable
from embedder.inputs.json_file import read_json, read_text
from embedder.inputs.prompt import SUFFIX, USER_HEADER, Piece, SpecialToken, TextPiece, prefix

_MEDIA = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
_INSTRUCTION = "Instruction."
_PARTS = (
    *(("text", "a text,\n"), ("image", "x"), ("text", " another ")),
    *(("video", "x"), ("image", "x"), ("text", "{end}")),
)


def check_chat_template(folder: Path) -> str:
    """Render the folder's chat template for one input of each kind, and return the file that has it ("": none).

    Raises `ModelUnavailable` if the prompt is not the one of `embedder.inputs.prompt`.
    """
    name, template = _find(folder)
    if template is None:
        return name
    expected, rendered = _expected(), _render(name, template)
    if rendered != expected:
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(expected, rendered, strict=False))
        start = sum(1 for _ in equal)
        raise ModelUnavailable(
            f"{name} renders another prompt than this service builds: {rendered[start : start + 60]!r} after "
            f"{rendered[max(0, start - 40) : start]!r}; allowed there: {expected[start : start + 60]!r}"
        )
    return name


def _find(folder: Path) -> tuple[str, str | None]:
    """The place that transformers' processor takes the template from, and the template."""
    places = (
        ("processor_config.json: chat_template", read_json(folder / "processor_config.json").get("chat_template")),
        ("chat_template.json: chat_template", read_json(folder / "chat_template.json").get("chat_template")),
    )
    for name, template in places:
        if template is not None:
            return name, _default_of(name, template)
    path = folder / "chat_template.jinja"
    found = read_text(path)
    return ("" if found is None else path.name), found


def _default_of(name: str, template: Any) -> str:
    """One template, or the one named `default` of several."""
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    chosen = template.get("default") if isinstance(template, dict) else template
    if not isinstance(chosen, str):
        raise ModelUnavailable(f"{name} is {type(template).__name__} without a template named default")
    return chosen


def _render(name: str, template: str) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages = [
        {"role": "system", "content": [{"type": "text", "text": _INSTRUCTION}]},
        {"role": "user", "content": [{"type": kind, kind: value} for kind, value in _PARTS]},
    ]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ModelUnavailable(f"{name} cannot be rendered: {type(error).__name__}: {error}") from error


def _expected() -> str:
    parts = "".join(_MEDIA.get(kind, value) for kind, value in _PARTS)
    return _text(prefix(_INSTRUCTION)) + USER_HEADER + parts + _text(SUFFIX)


def _text(pieces: tuple[Piece, ...]) -> str:
    texts = []
    for piece in pieces:
        assert isinstance(piece, SpecialToken | TextPiece)
        texts.append(piece.token if isinstance(piece, SpecialToken) else piece.text)
    return "".join(texts)
