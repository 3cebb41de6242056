"""HTTP: routes, dialects, and the middlewares around them.

boundary            outermost: request id, error responses, common headers, access log
pieces              the pieces of a body -> the whole
content_coding      compressed bodies of requests and responses
guard               API key, content type, limits on a body; with `api_keys` and `json_limits`
drain               requests in progress, and whether new ones are accepted
routes              the table of routes
disconnect          cancels the work of a request whose caller disconnects
body_reader         reads a body into the request of its dialect, in a thread if it is large
dialects            one file per dialect: body -> items, embeddings -> body
accepted_fields     fields that clients send and that change nothing
priority            `priority`, a field of every route that embeds or scores
error_forms         the bodies in which each route's clients read errors
wire_types          vectors as bytes of vLLM's number types
timing              response headers that say where the time went
document_pages      a document in a request -> the embeddings of its pages
uploads             images sent as files: forms, and bodies that are an image
batches             OpenAI's files and batches
byte_ranges         requests for parts of a file
playground_routes   the playground: its files, its collection, and reranking
request_body        options and error messages of all request bodies
response            vectors, usage and errors in response bodies
response_writer     writes response bodies, large ones in a thread
token_thread        the thread in which tokens are counted
openapi             the OpenAPI document; `openapi_tags` has its groups of routes
"""
