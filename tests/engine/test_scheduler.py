"""Which jobs go next: within the budget, cheap ones first, fair between requests, and none for ever last."""

from __future__ import annotations

import random

import pytest

from embedder.engine.scheduler import BATCH_S, HALF_LIFE_S, LEAST_TOKENS, STRETCH, Rate, Scheduler

AGEING = 0.0002  # seconds of waiting that make up for a token
SECONDS_PER_TOKEN = AGEING / STRETCH


def scheduler(max_batch_tokens: int) -> Scheduler[object]:
    return Scheduler(max_batch_tokens, SECONDS_PER_TOKEN)


def put_alone(queue: Scheduler[object], job: object, cost: int, now_s: float = 0.0) -> None:
    """A request of one item."""
    queue.put(job, cost, object(), now_s)


def drain(queue: Scheduler[object], now_s: float = 0.0) -> list[list[object]]:
    batches = []
    while len(queue):
        batches.append(queue.take(now_s))
    return batches


def test_batch_stays_within_the_budget_and_every_job_goes_once() -> None:
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
        put_alone(queue, job, 50)
    assert drain(queue) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("tokens_per_s", "most"), [(100_000, 16_384), (4096, 4096 * BATCH_S), (1000, LEAST_TOKENS), (1, LEAST_TOKENS)]
)
def test_batch_of_a_slow_device_is_cut_to_about_a_second(tokens_per_s: int, most: float) -> None:
    queue: Scheduler[object] = Scheduler(16_384, 1 / tokens_per_s)
    for number in range(1000):
        put_alone(queue, number, 64)
    assert len(queue.take(0.0)) == most // 64


def test_cheap_jobs_go_first() -> None:
    queue = scheduler(1000)
    for job, cost in (("picture", 900), ("sentence", 40), ("word", 10)):
        put_alone(queue, job, cost)
    assert queue.take(0.0) == ["word", "sentence", "picture"]


def test_equal_jobs_keep_their_order() -> None:
    queue = scheduler(1000)
    for number in range(20):
        put_alone(queue, number, 10)
    assert queue.take(0.0) == list(range(20))


def test_waiting_makes_up_for_cost() -> None:
    queue = scheduler(1)  # one job a batch
    head_start_s = 1280 * AGEING  # 0.256 s
    put_alone(queue, "picture", 1280)
    put_alone(queue, "too late to overtake", 0, head_start_s + 0.001)
    put_alone(queue, "in time", 0, head_start_s - 0.001)
    assert drain(queue, 0.3) == [["in time"], ["picture"], ["too late to overtake"]]


def test_expensive_job_does_not_starve_under_endless_cheap_ones() -> None:
    """More comes than can be served, for ever: the picture still goes once it has waited out its cost."""
    queue = scheduler(1300)
    put_alone(queue, "picture", 1280)
    now_s, served_at_s = 0.0, None
    while served_at_s is None and now_s < 60:
        for _ in range(40):
            put_alone(queue, object(), 50, now_s)  # 2000 tokens a step against a budget of 1300
        if "picture" in queue.take(now_s):
            served_at_s = now_s
        now_s += 0.01
    # It stands before whoever comes 0.246 s (its 1280 tokens less a query's 50) later than it did. Until then 25 steps
    # brought 25 * 40 queries; at 26 a step those take 38.5 steps
    assert served_at_s is not None
    assert 0.24 < served_at_s < 0.40


def test_nobody_is_overtaken_by_who_came_later_than_its_cost_allows() -> None:
    generator = random.Random(1)
    queue = scheduler(1000)
    served: list[tuple[int, float, int]] = []  # in which batch, arrival, cost
    jobs: dict[object, tuple[float, int]] = {}
    for step in range(300):  # about 1000 tokens come a step, so the queue grows and shrinks
        for _ in range(generator.randint(0, 6)):
            now_s, cost = step * 0.01, generator.choice([20, 100, 900])
            jobs[len(jobs)] = (now_s, cost)
            put_alone(queue, len(jobs) - 1, cost, now_s)
        served += [(step, *jobs[job]) for job in queue.take(step * 0.01)]
    assert len({batch for batch, _, _ in served}) < len(served)
    for batch, arrival_s, cost in served:
        overtakers = [other for other in served if other[0] < batch and other[1] > arrival_s + cost * AGEING]
        assert not overtakers


def test_newcomer_stands_behind_one_job_of_each_request() -> None:
    queue = scheduler(1)
    for request in "abc":
        for number in range(100):
            queue.put((request, number), 50, request, 0.0)
    queue.take(1.0)
    put_alone(queue, "query", 50, 1.0)
    assert [queue.take(1.1) for _ in range(4)] == [[("b", 0)], [("c", 0)], [("a", 1)], ["query"]]


def test_requests_share_in_tokens_not_in_items() -> None:
    """One of pictures and one of texts: once the first picture has aged, 20 texts of 50 tokens for each of 1000."""
    queue = scheduler(20_000)
    for number in range(5000):
        queue.put(("picture", number), 1000, "pictures", 0.0)
        queue.put(("text", number), 50, "texts", 0.0)
    batches = [queue.take(step * 20_000 * SECONDS_PER_TOKEN) for step in range(21)]
    taken = [kind for batch in batches[1:] for kind, _ in batch]
    assert 200 <= taken.count("picture") <= 220
    assert 16 <= taken.count("text") / taken.count("picture") <= 20


def test_discarded_job_costs_nothing_and_gives_its_turn_to_the_next() -> None:
    queue = scheduler(100)
    for job in ("first", "second", "third"):
        queue.put(job, 60, "request", 0.0)
    put_alone(queue, "other", 60, 0.5)
    assert queue.discard("first")
    assert not queue.discard("first")
    assert queue.discard("third")
    assert (queue.num_tokens, len(queue)) == (120, 2)
    assert drain(queue, 1.0) == [["second"], ["other"]]  # the turn of "first" began before "other" came
    assert not queue.discard("second")


@pytest.mark.parametrize("cost", [101, 5000])
def test_job_over_the_budget_goes_alone(cost: int) -> None:
    queue = scheduler(100)
    put_alone(queue, "large", cost)
    put_alone(queue, "before", 10)
    put_alone(queue, "after", 10, 10.0)
    assert drain(queue) == [["before"], ["large"], ["after"]]


def test_small_job_does_not_slip_past_one_that_does_not_fit() -> None:
    queue = scheduler(100)
    put_alone(queue, "first", 60)
    put_alone(queue, "does not fit", 60, 1.0)
    put_alone(queue, "would fit", 10, 2.0)
    assert drain(queue) == [["first"], ["does not fit", "would fit"]]


def test_tokens_and_jobs_are_counted() -> None:
    queue = scheduler(100)
    assert (queue.num_tokens, len(queue), queue.take(0.0)) == (0, 0, [])
    for job, cost in enumerate((30, 60, 500)):
        put_alone(queue, job, cost)
    assert (queue.num_tokens, len(queue)) == (590, 3)
    assert queue.take(0.0) == [0, 1]
    assert (queue.num_tokens, len(queue)) == (500, 1)
    assert queue.take(0.0) == [2]
    assert (queue.num_tokens, len(queue)) == (0, 0)


def test_rate_is_that_of_late_and_large_batches_say_most() -> None:
    rate = Rate(seconds_per_token=0.5)
    assert rate.seconds_per_token == 0.5
    rate.add(10, 0.1)
    rate.add(10_000, 1.0)
    assert rate.seconds_per_token == pytest.approx(1.1 / 10_010, rel=0.05)
    for _ in range(100):
        rate.add(1000, HALF_LIFE_S / 10)  # the device became slower; ten half-lives later
    assert rate.seconds_per_token == pytest.approx(HALF_LIFE_S / 10_000, rel=0.01)
