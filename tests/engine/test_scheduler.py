"""Which jobs run next: within the budget, cheap ones first, fair between requests, and none starves."""

from __future__ import annotations

import math
import random

import pytest

from embedder.engine.callers import EVERYONE
from embedder.engine.scheduler import HALF_LIFE_S, ON_CPU, ON_GPU, STRETCH, BatchLength, Rate, Scheduler

AGING = 0.0002  # seconds of waiting that compensate for the cost of one token
SECONDS_PER_TOKEN = AGING / STRETCH


def scheduler(max_batch_tokens: int) -> Scheduler[object]:
    return Scheduler(max_batch_tokens, SECONDS_PER_TOKEN, BatchLength(math.inf, 0))


def put_request(queue: Scheduler[object], job: object, cost: int, now_s: float = 0.0, caller: str = EVERYONE) -> None:
    """A request of one item."""
    queue.put(job, cost, object(), now_s, caller=caller)


def drain(queue: Scheduler[object], now_s: float = 0.0) -> list[list[object]]:
    batches = []
    while len(queue):
        batches.append(queue.take(now_s))
    return batches


def test_batch_stays_within_the_budget_and_every_job_runs_once() -> None:
    generator = random.Random(0)
    costs = [generator.choice([5, 30, 300, 1300, 5000]) for _ in range(400)]
    queue = scheduler(2000)
    for job, cost in enumerate(costs):
        queue.put(job, cost, generator.randrange(20), now_s=generator.random())
    batches = drain(queue)
    assert sorted(job for batch in batches for job in batch) == list(range(400))
    for batch in batches:
        assert len(batch) == 1 or sum(costs[job] for job in batch) <= 2000


def test_budget_is_used_to_the_last_token() -> None:
    queue = scheduler(100)
    for job in "abc":
        put_request(queue, job, 50)
    assert drain(queue) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("length", "tokens_per_s", "most"),
    [
        (ON_CPU, 100_000, 16_384),
        (ON_CPU, 16_384, 4096),  # 0.25 s
        (ON_CPU, 1000, 1024),
        (ON_CPU, 1, 1024),
        (ON_GPU, 1_000_000, 16_384),
        (ON_GPU, 269_000, 6725),  # 25 ms, the 2B at an H200's roofline
        (ON_GPU, 62_000, 2048),  # the 8B there
    ],
)
def test_batch_is_limited_by_the_time_it_takes(length: BatchLength, tokens_per_s: int, most: float) -> None:
    queue: Scheduler[object] = Scheduler(16_384, 1 / tokens_per_s, length)
    for number in range(1000):
        put_request(queue, number, 64)
    assert len(queue.take(0.0)) == most // 64


def test_cheap_jobs_run_first() -> None:
    queue = scheduler(1000)
    for job, cost in (("image", 900), ("sentence", 40), ("word", 10)):
        put_request(queue, job, cost)
    assert queue.take(0.0) == ["word", "sentence", "image"]


def test_equal_jobs_keep_their_order() -> None:
    queue = scheduler(1000)
    for number in range(20):
        put_request(queue, number, 10)
    assert queue.take(0.0) == list(range(20))


def test_waiting_compensates_for_cost() -> None:
    queue = scheduler(1)  # one job a batch
    head_start_s = 1280 * AGING  # 0.256 s
    put_request(queue, "image", 1280)
    put_request(queue, "too late to overtake", 0, head_start_s + 0.001)
    put_request(queue, "in time", 0, head_start_s - 0.001)
    assert drain(queue, 0.3) == [["in time"], ["image"], ["too late to overtake"]]


def test_expensive_job_does_not_starve_among_endless_cheap_ones() -> None:
    """More jobs arrive than the device can run; the image runs once it has waited long enough for its cost."""
    queue = scheduler(1300)
    put_request(queue, "image", 1280)
    now_s, served_at_s = 0.0, None
    while served_at_s is None and now_s < 60:
        for _ in range(40):
            put_request(queue, object(), 50, now_s)  # 2000 tokens a step against a budget of 1300
        if "image" in queue.take(now_s):
            served_at_s = now_s
        now_s += 0.01
    # It precedes all queries that arrive more than 0.246 s after it (its 1280 tokens less a query's 50). Until then 25
    # steps have brought 25 * 40 queries, which take 38.5 steps at 26 a step.
    assert served_at_s is not None
    assert 0.24 < served_at_s < 0.40


def test_job_is_not_overtaken_by_one_that_arrives_later_than_its_cost_allows() -> None:
    generator = random.Random(1)
    queue = scheduler(1000)
    served: list[tuple[int, float, int]] = []  # number of the batch, arrival, cost
    jobs: dict[object, tuple[float, int]] = {}
    for step in range(300):  # about 1000 tokens arrive per step, so the queue grows and shrinks
        for _ in range(generator.randint(0, 6)):
            now_s, cost = step * 0.01, generator.choice([20, 100, 900])
            jobs[len(jobs)] = (now_s, cost)
            put_request(queue, len(jobs) - 1, cost, now_s)
        served += [(step, *jobs[job]) for job in queue.take(step * 0.01)]
    assert len({batch for batch, _, _ in served}) < len(served)
    for batch, arrival_s, cost in served:
        overtakers = [other for other in served if other[0] < batch and other[1] > arrival_s + cost * AGING]
        assert not overtakers


def test_new_request_waits_for_one_job_of_each_other_request() -> None:
    queue = scheduler(1)
    for request in "abc":
        for number in range(100):
            queue.put((request, number), 50, request, 0.0)
    queue.take(1.0)
    put_request(queue, "query", 50, 1.0)
    assert [queue.take(1.1) for _ in range(4)] == [[("b", 0)], [("c", 0)], [("a", 1)], ["query"]]


def test_requests_share_the_device_by_tokens_and_not_by_items() -> None:
    """A request of images and one of texts: after the first image, 20 texts of 50 tokens run per image of 1000."""
    queue = scheduler(20_000)
    for number in range(5000):
        queue.put(("image", number), 1000, "images", 0.0)
        queue.put(("text", number), 50, "texts", 0.0)
    batches = [queue.take(step * 20_000 * SECONDS_PER_TOKEN) for step in range(21)]
    taken = [kind for batch in batches[1:] for kind, _ in batch]
    assert 200 <= taken.count("image") <= 220
    assert 16 <= taken.count("text") / taken.count("image") <= 20


def test_new_request_waits_for_one_job_of_each_other_caller() -> None:
    queue = scheduler(1)
    for caller in "abc":
        for number in range(100):
            put_request(queue, (caller, number), 50, 0.0, caller)
    queue.take(1.0)
    put_request(queue, "query", 50, 1.0, "d")
    assert [queue.take(1.1) for _ in range(4)] == [[("b", 0)], [("c", 0)], [("a", 1)], ["query"]]


def test_callers_share_the_device_however_many_requests_they_send() -> None:
    """One caller has 5,000 requests of an image, and another one request with 5,000 texts."""
    queue = scheduler(20_000)
    for number in range(5000):
        put_request(queue, ("image", number), 1000, 0.0, "many requests")
        queue.put(("text", number), 50, "texts", 0.0, caller="one request")
    batches = [queue.take(step * 20_000 * SECONDS_PER_TOKEN) for step in range(21)]
    taken = [kind for batch in batches[1:] for kind, _ in batch]
    assert 200 <= taken.count("image") <= 220
    assert 16 <= taken.count("text") / taken.count("image") <= 20


def test_short_requests_of_a_caller_do_not_make_its_long_one_wait_for_other_callers() -> None:
    """A caller's turn stays as old as its long job, although short ones of the same caller come and go."""
    queue = scheduler(1)
    now_s = 0.0
    put_request(queue, "before", 1000, now_s - 4000 * SECONDS_PER_TOKEN, "b")
    put_request(queue, "long", 1000, now_s, "a")
    for number in range(100):
        put_request(queue, ("short", number), 1, now_s, "a")
        put_request(queue, ("other", number), 1000, now_s, "b")
        taken = [queue.take(now_s), queue.take(now_s)]
        if ["long"] in taken:
            break
        now_s += 1020 * SECONDS_PER_TOKEN  # the device keeps up with the caller of the others, and the short ones
    assert now_s < 1000 * AGING  # it runs when its turn is older than that of the other caller


def test_callers_are_forgotten_with_their_last_job() -> None:
    queue = scheduler(1)
    for number in range(100):
        put_request(queue, number, 10, 0.0, str(number % 10))
    for number in range(50):
        assert queue.discard(number)
    assert len(drain(queue)) == 50
    assert not queue._callers
    assert queue.take(1.0) == []


def test_discarded_job_costs_nothing_and_passes_its_turn_to_the_next() -> None:
    queue = scheduler(100)
    for job in ("first", "second", "third"):
        queue.put(job, 60, "request", 0.0)
    put_request(queue, "other", 60, 0.5)
    assert queue.discard("first")
    assert not queue.discard("first")
    assert queue.discard("third")
    assert len(queue) == 2
    assert drain(queue, 1.0) == [["second"], ["other"]]  # the turn of "first" began before "other" came
    assert not queue.discard("second")


@pytest.mark.parametrize("cost", [101, 5000])
def test_job_over_the_budget_runs_by_itself(cost: int) -> None:
    queue = scheduler(100)
    put_request(queue, "large", cost)
    put_request(queue, "before", 10)
    put_request(queue, "after", 10, 10.0)
    assert drain(queue) == [["before"], ["large"], ["after"]]


def test_small_job_does_not_overtake_one_that_does_not_fit() -> None:
    queue = scheduler(100)
    put_request(queue, "first", 60)
    put_request(queue, "does not fit", 60, 1.0)
    put_request(queue, "would fit", 10, 2.0)
    assert drain(queue) == [["first"], ["does not fit", "would fit"]]


def test_jobs_are_counted() -> None:
    queue = scheduler(100)
    assert (len(queue), queue.take(0.0)) == (0, [])
    for job, cost in enumerate((30, 60, 500)):
        put_request(queue, job, cost)
    assert len(queue) == 3
    assert queue.take(0.0) == [0, 1]
    assert len(queue) == 1
    assert queue.take(0.0) == [2]
    assert len(queue) == 0


def test_rate_is_the_recent_one_and_large_batches_count_most() -> None:
    rate = Rate(seconds_per_token=0.5)
    assert rate.seconds_per_token == 0.5
    rate.add(10, 0.1)
    rate.add(10_000, 1.0)
    assert rate.seconds_per_token == pytest.approx(1.1 / 10_010, rel=0.05)
    for _ in range(100):
        rate.add(1000, HALF_LIFE_S / 10)  # the device became slower; ten half-lives later
    assert rate.seconds_per_token == pytest.approx(HALF_LIFE_S / 10_000, rel=0.01)
