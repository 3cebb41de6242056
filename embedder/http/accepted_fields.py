"""Fields that clients send and that cannot change a vector here: accepted on every route, and ignored.

All other fields that a route does not know are refused, because ignoring one of them could change the vector.
"""

from __future__ import annotations

ACCEPTED: dict[str, str] = {  # name -> who sends it
    "add_generation_prompt": "vLLM's clients: the prompt always ends with the header of the answer",
    "add_special_tokens": "vLLM's clients: the prompt has the model's special tokens (but see `/tokenize`)",
    "cache_salt": "vLLM's clients: cached vectors have no salt",
    "continue_final_message": "vLLM's clients: only with an empty last message, which changes nothing",
    "drop_params": "LiteLLM and RAGFlow: an instruction to the proxy",
    "extra_headers": "LiteLLM: an instruction to the proxy",
    "keep_alive": "Ollama's clients: the model stays loaded",
    "metadata": "LiteLLM: labels for the proxy's log",
    "model": "almost all clients: a service has one model, and the response names it",
    "padding": "vLLM's clients: sequences are packed, not padded",
    "parameters_version": "DashScope's clients",
    "priority": "vLLM's and Cohere's clients: counting tokens waits for nobody; other routes have it",
    "provider": "OpenRouter's clients: which providers may serve the request",
    "request_id": "vLLM's clients: the header x-request-id sets the id",
    "service_tier": "OpenAI's clients: there is one tier",
    "store": "OpenAI's clients: nothing is stored",
    "stream": "clients of chat routes: a response with vectors is sent whole",
    "timeout": "LiteLLM: the client's own time limit",
    "user": "OpenAI's clients: an id of the end user",
}
