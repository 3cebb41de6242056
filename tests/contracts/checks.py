"""The table of contracts: what a client sends, checked with that client, in the environment of a requirements file.

Each check gets the service's URL, and raises if the client does not get the vectors of `POST /embed`. `behaviors` has
the rows that need no client. The command `python -m tests.contracts.checks URL ENVIRONMENT` prints the outcomes as
JSON; `python -m tests.contracts` runs it.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = ["red", "a green circle"]
EXAMPLE_IMAGE = (  # a red square of 32x32 pixels; the environment of the clients lacks the package
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mN4JqdBU8"
    "QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULAK6hsD0HQA3uAAAAAElFTkSuQmCC"
)
PNG = base64.b64decode(EXAMPLE_IMAGE)
SAME = 1e-6  # float32


@dataclass(frozen=True)
class Check:
    """One row. `needs`: the module or command that it uses. `refusal`: why the service refuses, if it does.

    `environment`: name of the requirements file with the client.
    """

    contract: str
    check: str
    source: str
    needs: str
    run: Callable[[str], None]
    refusal: str = ""
    environment: str = "requirements"


@dataclass(frozen=True)
class Outcome:
    """What came of a check. `error` is empty if the check passed."""

    contract: str
    check: str
    source: str
    refusal: str
    error: str
    seconds: float


CHECKS: list[Check] = []
VLLM = "vllm"  # the command; its package is several GB, so it is used only where it is installed
LEFT_OUT = {VLLM: "give the folder of an environment with vLLM as --vllm"}  # command: why its checks do not run


def check(
    contract: str, what: str, *, source: str, needs: str = "", refusal: str = "", environment: str = "requirements"
) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Add the decorated function to the table."""

    def add(run: Callable[[str], None]) -> Callable[[str], None]:
        CHECKS.append(Check(contract, what, source, needs, run, refusal, environment))
        return run

    return add


def expected(url: str, items: Sequence[Any] = TEXTS, **options: Any) -> list[Any]:
    """The vectors that the native route gives."""
    body = json.dumps({"items": list(items), **options}).encode()
    request = urllib.request.Request(f"{url}/embed", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return [result["embedding"] for result in json.load(response)["results"]]


def assert_same(vectors: Any, wanted: Any) -> None:
    difference = np.abs(np.array(vectors, np.float32) - np.array(wanted, np.float32)).max()
    assert difference <= SAME, f"the vectors differ by {difference}"


@check("OpenAI", "embeddings.create, which asks for base64 by itself", source="openai (SDK)", needs="openai")
def openai_base64(url: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="any", input=TEXTS)
        assert_same([one.embedding for one in answer.data], expected(url))


@check("OpenAI", "floats, fewer dimensions", source="openai (SDK)", needs="openai")
def openai_dimensions(url: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="any", input=TEXTS, dimensions=64, encoding_format="float")
        assert_same([one.embedding for one in answer.data], expected(url, dimensions=64))


@check(
    "OpenAI",
    "token ids as input",
    source="openai (SDK)",
    needs="openai",
    refusal="ids of another tokenizer would embed garbage",
)
def openai_token_ids(url: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        refused = None
        try:
            client.embeddings.create(model="any", input=[[1, 2, 3]])
        except openai.BadRequestError as error:
            refused = str(error)
    assert "check_embedding_ctx_length=False" in str(refused), f"got {refused}"


@check("OpenAI", "LangChain's OpenAIEmbeddings", source="langchain-openai", needs="langchain_openai")
def langchain_openai(url: str) -> None:
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model="any", check_embedding_ctx_length=False)  # type: ignore[arg-type]
    assert_same(embeddings.embed_documents(TEXTS), expected(url))


@check("OpenAI", "LiteLLM's embedding, which sends null fields", source="litellm", needs="litellm")
def litellm_embedding(url: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    answer = litellm.embedding(model="openai/any", input=TEXTS, api_base=f"{url}/v1", api_key="none")
    assert_same([one["embedding"] for one in answer.data], expected(url))


@check("OpenAI", "Haystack's OpenAIDocumentEmbedder", source="haystack-ai", needs="haystack")
def haystack_documents(url: str) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder
    from haystack.utils import Secret

    embedder = OpenAIDocumentEmbedder(api_key=Secret.from_token("none"), api_base_url=f"{url}/v1", model="any")
    documents = embedder.run([Document(content=text) for text in TEXTS])["documents"]
    assert_same([one.embedding for one in documents], expected(url))


@check("OpenAI", "Chroma's OpenAIEmbeddingFunction", source="chromadb", needs="chromadb")
def chroma_openai(url: str) -> None:
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    assert_same(OpenAIEmbeddingFunction(api_key="none", api_base=f"{url}/v1", model_name="any")(TEXTS), expected(url))


@check(
    "OpenAI", "Baseten's performance client", source="baseten-performance-client", needs="baseten_performance_client"
)
def baseten(url: str) -> None:
    from baseten_performance_client import PerformanceClient

    answer = PerformanceClient(base_url=url, api_key="none").embed(input=TEXTS, model="any")
    assert_same([one.embedding for one in answer.data], expected(url))


@check("OpenAI", "JDK HttpClient, which offers h2c", source="java.net.http (JDK)", needs="java")
def jdk_http_client(url: str) -> None:
    probe = Path(__file__).with_name("HttpClientProbe.java")
    done = subprocess.run(["java", str(probe), url], capture_output=True, text=True, timeout=120)
    status, _, body = done.stdout.partition("\n")
    assert status == "200", done.stdout + done.stderr
    assert_same([json.loads(body)["data"][0]["embedding"]], expected(url, TEXTS[:1]))


@check("OpenAI", "curl --http2, with null fields", source="curl", needs="curl")
def curl_http2(url: str) -> None:
    fields = {"input": TEXTS, "encoding_format": None, "dimensions": None, "user": None}
    command = ["curl", "-sf", "--http2", f"{url}/v1/embeddings", "--json", json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert_same([one["embedding"] for one in json.loads(done.stdout)["data"]], expected(url))


@check("files", "curl -F image=@cat.png, two files and an option", source="curl", needs="curl")
def curl_form(url: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(PNG)
        file.flush()
        form = ["-F", f"image=@{file.name}", "-F", f"image=@{file.name}", "-F", "dimensions=64"]
        done = subprocess.run(["curl", "-sf", f"{url}/img/embed", *form], capture_output=True, timeout=60, check=True)
    assert_same(json.loads(done.stdout)["embedding"], expected(url, [{"image": EXAMPLE_IMAGE}] * 2, dimensions=64))


@check("files", "curl --data-binary @cat.png", source="curl", needs="curl")
def curl_body(url: str) -> None:
    command = ["curl", "-sf", f"{url}/img/embed", "-H", "content-type: image/png", "--data-binary", "@-"]
    done = subprocess.run(command, input=PNG, capture_output=True, timeout=60, check=True)
    assert_same([json.loads(done.stdout)["embedding"]], expected(url, [{"image": EXAMPLE_IMAGE}]))


@check(
    "NVIDIA NIM",
    "NVIDIAEmbeddings, which sends truncate NONE",
    source="langchain-nvidia-ai-endpoints",
    needs="langchain_nvidia_ai_endpoints",
)
def nvidia(url: str) -> None:
    from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings

    name = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=60))["data"][0]["id"]
    embeddings = NVIDIAEmbeddings(base_url=f"{url}/v1", model=name, nvidia_api_key="none")
    assert_same(embeddings.embed_documents(TEXTS), expected(url))


@check("Cohere", "ClientV2.embed, floats and base64", source="cohere (SDK 7)", needs="cohere")
def cohere_v2(url: str) -> None:
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=url)
    kinds = ["float", "base64"]
    found = client.embed(model="any", texts=TEXTS, input_type="search_document", embedding_types=kinds).embeddings
    assert_same(found.float_, expected(url))
    assert_same([np.frombuffer(base64.b64decode(one), "<f4") for one in found.base64 or ()], expected(url))


@check(
    "Cohere",
    "LangChain's CohereEmbeddings, which posts to /v1/embed",
    source="langchain-cohere",
    needs="langchain_cohere",
    environment="langchain-cohere",
)
def langchain_cohere(url: str) -> None:
    from langchain_cohere import CohereEmbeddings

    embeddings = CohereEmbeddings(model="any", cohere_api_key="none", base_url=url)  # type: ignore[arg-type]
    assert_same(embeddings.embed_documents(TEXTS), expected(url))
    query = expected(url, ["red"], instruction="Retrieve images or text relevant to the user's query.")
    assert_same([embeddings.embed_query("red")], query)


@check("Voyage", "Client.embed", source="voyageai (SDK)", needs="voyageai")
def voyage_texts(url: str) -> None:
    import voyageai

    client = voyageai.Client(api_key="none", base_url=f"{url}/v1")
    assert_same(client.embed(TEXTS, model="any", input_type="document").embeddings, expected(url))


@check("Voyage", "its error for a text that cannot be embedded", source="voyageai (SDK)", needs="voyageai")
def voyage_error(url: str) -> None:
    import voyageai

    client, message = voyageai.Client(api_key="none", base_url=f"{url}/v1"), ""
    try:
        client.embed([""], model="any")
    except voyageai.error.InvalidRequestError as error:
        message = str(error)
    assert message.startswith("item 0: text is empty")


@check("Voyage", "Client.multimodal_embed", source="voyageai (SDK)", needs="voyageai")
def voyage_mixtures(url: str) -> None:
    import voyageai

    client = voyageai.Client(api_key="none", base_url=f"{url}/v1")
    assert_same(client.multimodal_embed([[text] for text in TEXTS], model="any").embeddings, expected(url))


@check("Ollama", "Client.embed", source="ollama (client)", needs="ollama")
def ollama_embed(url: str) -> None:
    import ollama

    assert_same(ollama.Client(url).embed("any", TEXTS).embeddings, expected(url))


@check("Ollama", "Client.embeddings, the older call", source="ollama (client)", needs="ollama")
def ollama_prompt(url: str) -> None:
    import ollama

    assert_same([ollama.Client(url).embeddings("any", TEXTS[0]).embedding], expected(url, TEXTS[:1]))


@check("Ollama", "Client.list", source="ollama (client)", needs="ollama")
def ollama_list(url: str) -> None:
    import ollama

    assert len(ollama.Client(url).list().models) == 1


@check("Ollama", "Client.embed without input, which loads a model", source="ollama (client)", needs="ollama")
def ollama_load(url: str) -> None:
    import ollama

    assert [list(ollama.Client(url).embed("any", nothing).embeddings) for nothing in ("", [])] == [[], []]


@check("Ollama", "LangChain's OllamaEmbeddings", source="langchain-ollama", needs="langchain_ollama")
def langchain_ollama(url: str) -> None:
    from langchain_ollama import OllamaEmbeddings

    assert_same(OllamaEmbeddings(model="any", base_url=url).embed_documents(TEXTS), expected(url))


@check("TEI", "InferenceClient.feature_extraction", source="huggingface_hub", needs="huggingface_hub")
def tei(url: str) -> None:
    from huggingface_hub import InferenceClient

    assert_same(InferenceClient(f"{url}/embed").feature_extraction(TEXTS[0]), expected(url, TEXTS[:1]))


@check("TEI", "InferenceClient with the service as its base URL", source="huggingface_hub", needs="huggingface_hub")
def tei_base_url(url: str) -> None:
    from huggingface_hub import InferenceClient

    client, vectors = InferenceClient(base_url=url), np.array(expected(url))
    assert_same(client.feature_extraction(TEXTS[0], normalize=True), vectors[:1])
    assert_same(client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:]), vectors[1:] @ vectors[0])


@check("TEI", "Chroma's HuggingFaceEmbeddingServer", source="chromadb", needs="chromadb")
def chroma_tei(url: str) -> None:
    from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

    assert_same(HuggingFaceEmbeddingServer(url)(TEXTS), expected(url))


@check("infinity", "embeddings", source="infinity-client", needs="infinity_client")
def infinity(url: str) -> None:
    from infinity_client import Client
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputText

    body = OpenAIEmbeddingInputText(input_=TEXTS, model="any")
    with Client(base_url=url) as client:
        answer = embeddings.sync(client=client, body=body)
    assert_same([one.embedding for one in answer.data], expected(url))


@check("infinity", "models", source="infinity-client", needs="infinity_client")
def infinity_models(url: str) -> None:
    from infinity_client import Client
    from infinity_client.api.default import models

    with Client(base_url=url) as client:
        found = [one.id for one in models.sync(client=client).data]  # with a reranker, two
    served = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=60))["data"]
    assert found == [one["id"] for one in served], found


@check("KServe v2", "live, ready, metadata, infer", source="tritonclient.http", needs="tritonclient")
def kserve(url: str) -> None:
    from tritonclient.http import InferenceServerClient, InferInput

    client = InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("any")
    inputs = InferInput("text", [len(TEXTS)], "BYTES")
    inputs.set_data_from_numpy(np.array(TEXTS, object), binary_data=False)
    (output,) = client.get_model_metadata("any")["outputs"]
    vectors = client.infer("any", [inputs], priority=1, timeout=10**7).as_numpy(output["name"])
    assert_same(vectors.reshape(len(TEXTS), -1), expected(url))


def run(row: Check, url: str) -> Outcome:
    """The outcome of one check; whatever it raises is its error."""
    start_s = time.monotonic()
    error = ""
    try:
        row.run(url)
    except Exception as failure:  # a client may raise anything, and the others still have to run
        error = traceback.format_exception_only(failure)[-1].strip()
    return Outcome(row.contract, row.check, row.source, row.refusal, error, round(time.monotonic() - start_s, 2))


if __name__ == "__main__":
    from tests.contracts import behaviors, checks, ranking, vllm_bench  # this module by its name, too

    rows = [row for row in checks.CHECKS if row.environment == sys.argv[2] and row.needs not in sys.argv[3:]]
    assert behaviors.SOURCES
    assert ranking.DOCUMENTS
    assert vllm_bench.BACKENDS
    print(json.dumps([asdict(run(row, sys.argv[1])) for row in rows]))
