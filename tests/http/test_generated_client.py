"""A client generated from the document, by a general generator, gets the library's vectors."""

from __future__ import annotations

import base64
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from embedder import Embedder
from tests.conftest import Server, encoded, picture

PNG = encoded(picture(70, 50))
PACKAGE = "generated_client"


@pytest.fixture(scope="module")
def generated(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the package, importable."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(httpx.get(f"{server.url}/openapi.json").text)
    (folder / "config.yml").write_text("post_hooks: []\n")  # it would run ruff, from PATH
    generator = Path(sys.executable).parent / "openapi-python-client"
    command = [str(generator), "generate", "--path", "openapi.json", "--output-path", PACKAGE]
    options = ["--meta", "none", "--config", "config.yml", "--fail-on-warning"]
    run = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder / PACKAGE
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def assert_same(vectors: Any, expected: Any) -> None:
    assert np.abs(np.array(vectors, np.float32) - np.stack(expected)).max() <= 1e-6


@pytest.fixture
def generated_client(generated: Path, server: Server) -> Iterator[Any]:
    with module("client").Client(base_url=server.url, timeout=httpx.Timeout(60)) as client:
        yield client


def test_every_operation_and_model_is_generated_and_imported(generated: Path) -> None:
    document = json.loads((generated.parent / "openapi.json").read_text())
    names = [method["operationId"] for path in document["paths"].values() for method in path.values()]
    assert {path.stem for path in (generated / "api").glob("*/[a-z]*.py")} == set(names)
    for path in generated.rglob("[a-z]*.py"):
        module(".".join(path.relative_to(generated).with_suffix("").parts))


def test_texts_and_images_are_embedded(generated_client: Any, embedder: Embedder) -> None:
    models = module("models")
    embed_text, embed_image = module("api.embed.txt_embed"), module("api.embed.img_embed")
    text = embed_text.sync(client=generated_client, body=models.TextRequest(input_="red"))
    texts = embed_text.sync(client=generated_client, body=models.TextRequest(input_=["red", "green"], dimensions=64))
    image = embed_image.sync(
        client=generated_client, body=models.ImageRequest(input_=base64.b64encode(PNG).decode(), instruction="Find it.")
    )
    assert (text.dimensions, texts.dimensions, text.model) == (192, 64, embedder.checkpoint.name)
    assert_same([text.embedding], embedder.embed(["red"]))
    assert_same(texts.embedding, embedder.embed(["red", "green"], dimensions=64))
    assert_same([image.embedding], embedder.embed([{"image": PNG}], instruction="Find it."))


def test_item_that_fails_leaves_the_others_embedded(generated_client: Any, embedder: Embedder) -> None:
    image = base64.b64encode(PNG).decode()
    content = [{"type": "text", "text": "a swatch: "}, {"type": "image", "image": image}]
    body = module("models").EmbedRequest(items=["red", {"content": content, "id": "both"}, {"image": "no picture"}])
    answer = module("api.embed.embed").sync(client=generated_client, body=body)
    red, both, bad = answer.results
    assert_same([red.embedding, both.embedding], embedder.embed(["red", {"content": content}]))
    assert (both.id, bad.error.code) == ("both", "invalid_media")
    assert answer.usage.total_tokens > 0


def test_openais_and_coheres_routes_return_the_librarys_vectors(generated_client: Any, embedder: Embedder) -> None:
    models = module("models")
    openai = module("api.open_ai.v1_embeddings").sync(
        client=generated_client, body=models.EmbeddingsRequest(input_=["red", "green"])
    )
    cohere = module("api.cohere.v2_embed").sync(
        client=generated_client, body=models.CohereEmbedRequest(texts=["red", "green"])
    )
    for vectors in ([one.embedding for one in openai.data], cohere.embeddings["float"]):
        assert_same(vectors, embedder.embed(["red", "green"]))
    served = module("api.open_ai.v1_models").sync(client=generated_client)
    assert [model.id for model in served.data] == [embedder.checkpoint.name]


def test_error_is_a_typed_object(generated_client: Any) -> None:
    models = module("models")
    body = models.TextRequest(input_=["red", ""])
    answer = module("api.embed.txt_embed").sync(client=generated_client, body=body)
    assert isinstance(answer, models.ErrorResponse)
    assert (answer.error.code, answer.error.item) == ("invalid_request", 1)


def test_image_can_be_sent_as_a_file(generated_client: Any, embedder: Embedder) -> None:
    file, img_embed = module("types").File, module("api.embed.img_embed")
    expected = embedder.embed([{"image": base64.b64encode(PNG).decode()}], dimensions=64)
    body = file(BytesIO(PNG), "a.png", "image/png")
    answer = img_embed.sync(client=generated_client, body=body, dimensions=64)
    assert_same([answer.embedding], expected)
    form = module("models.image_form").ImageForm(image=[body], dimensions=64, normalize=True)
    assert_same([img_embed.sync(client=generated_client, body=form).embedding], expected)
