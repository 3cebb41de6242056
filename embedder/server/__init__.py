"""Everything that depends on the internals of BentoML, uvicorn and circus, each with a row in this ledger.

A row says what the code does, against which upstream version, why the public interface is not enough, when the code can
be deleted, and which test fails when upstream changes.

bento_app.serve_inside
    Subclasses the class of a BentoML service, so that our middlewares are outside of BentoML's (BentoML 1.4.40).
    `Service.add_asgi_middleware` puts them inside of BentoML's timeout middleware. That one keeps a timer for each
    request until the timeout has passed, 150 s by default: about 400 bytes each, or 240 MB at 4,000 requests per
    second (`python -m benchmarks.bento_timers`, bundled model). It costs no measurable time next to a real forward
    pass. It also leaves the caller waiting when an exception passes through it.
    Goes when: the timeout of a service can be None.
    Test: tests/server/test_service.py, every route.
bento_app.RaisingErrors
    Reads the body of BentoML's error responses, which have three shapes (BentoML 1.4.40).
    There is no hook for the form of an error.
    Goes when: BentoML lets a service render its errors.
    Test: tests/server/test_bento_app.py.
bento_app.with_api_page
    Loads Swagger UI from `/static_content`, where BentoML's own page has it (BentoML 1.4.40).
    That page is called "BentoML Prediction Service", has no link to the playground, and is not made for phones.
    Goes when: BentoML lets a service choose its page.
    Test: tests/playground/test_api_page.py.
adaptive_batching.GatheredRows
    Relies on BentoML's dispatcher cutting a batch's result with one slice for each request (BentoML 1.4.40).
    A batchable API may not see the request: its context is that of another caller, and one exception fails the batch.
    Goes when: the dispatcher allows several batches in flight, and an error for each row.
    Test: tests/server/test_service.py, `batching`.
adaptive_batching.refuse_extra_fields
    Rebuilds the pydantic model that BentoML derives from an API's signature (BentoML 1.4.40).
    The model ignores unknown fields, so a misspelled option would be dropped silently.
    Goes when: `bentoml.api` takes a model's configuration.
    Test: tests/server/test_service.py, "field next to the rows".
bento_log.configure_logging
    Adds a filter to the logger `bentoml._internal.server.http_app` and sets `trace_msg` on records (BentoML 1.4.40).
    BentoML logs a traceback, with the request's body, for each request that it refuses.
    Goes when: BentoML logs no tracebacks of errors below 500.
    Test: tests/telemetry/test_log.py.
lifecycle.check_port
    Reads the click context of `bentoml serve` and BentoMLContainer (BentoML 1.4.40, click 8).
    BentoML itself fails with a traceback, after the workers have started.
    Goes when: `bentoml serve` checks its port first.
    Test: tests/server/test_lifecycle.py, `start_that_fails`.
lifecycle.handle_signals
    Replaces `SysHandler.quit` and `reload` of circus and reads `arbiter._stopping` (kantoku 0.18, BentoML's fork).
    circus drops a command that arrives while another is executed, so a SIGTERM could be lost. At SIGHUP it starts a
    second worker, for which a GPU may have no memory; then the whole service would end.
    Goes when: circus queues the command, and its answer to SIGHUP is a setting.
    Test: tests/server/test_lifecycle.py, `busy_arbiter`, `end_other_programs`.
lifecycle.replace_dead_workers_at_once
    Wraps `Watcher.call_hook` and `Arbiter.manage_watchers` of circus (kantoku 0.18).
    circus looks for dead workers every 10 s and logs nothing. It has hooks, but BentoML creates the watchers without
    them, after the service's own hook has run. Two looks at the same time would log a traceback.
    Goes when: BentoML logs and replaces workers that end.
    Test: tests/server/test_lifecycle.py, `killed_worker`.
lifecycle.end_hanging_workers
    Wraps `Watcher.call_hook` of circus and reads `Watcher.processes` (kantoku 0.18).
    circus does not notice that a worker is stopped or hangs, and the worker's callers wait without an end.
    Goes when: circus watches whether its processes are alive.
    Test: tests/faults/test_faults.py, `worker_is_stopped`, `interpreter_hangs`.
lifecycle.worker_server, lifecycle.drain_at_sigterm
    Finds uvicorn's server through its signal handler, and delays `handle_exit` (uvicorn 0.54, BentoML 1.4.40).
    BentoML creates the server itself, and uvicorn closes idle and arriving connections at once.
    Goes when: BentoML has a hook before shutdown that may wait.
    Test: tests/server/test_lifecycle.py, `sigterm`.
connection.BoundedProtocol
    Subclasses uvicorn's HttpToolsProtocol and FlowControl, replaces its `data_received`, its keep-alive timer and its
    queue of pipelined requests, and writes to its `cycle` (uvicorn 0.54, httptools 0.9).
    uvicorn bounds neither the size and time of a request's head, nor the requests that wait in a connection, nor how
    long a response may stay unread; four states have no timer; trailers become headers; a caller that half-closes gets
    no response; its own errors are plain text.
    Goes when: uvicorn has these limits, or BentoML lets a service choose its server (see "Decisions").
    Test: tests/server/test_connection.py.
upgrade.ignore_upgrade
    Replaces httptools' parser (httptools 0.9), which loses the body of a request that offers another protocol.
    There is no setting to ignore the offer.
    Goes when: httptools can ignore an offer.
    Test: tests/server/test_connection.py, `offer_of_another_protocol`.
"""
