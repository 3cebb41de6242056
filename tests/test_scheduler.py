"""Which jobs go next: within the budget, cheap ones first, and none for ever last."""

from __future__ import annotations

import random

import pytest

from embedder.scheduler import SECONDS_PER_TOKEN, Scheduler


def drain(scheduler: Scheduler[int]) -> list[list[int]]:
    batches = []
    while len(scheduler):
        batches.append(scheduler.take())
    return batches


def test_batch_stays_within_the_budget_and_every_job_goes_once() -> None:
    generator = random.Random(0)
    costs = [generator.choice([5, 30, 300, 1300, 5000]) for _ in range(400)]
    scheduler: Scheduler[int] = Scheduler(2000)
    for job, cost in enumerate(costs):
        scheduler.put(job, cost, arrival_s=generator.random())
    batches = drain(scheduler)
    assert sorted(job for batch in batches for job in batch) == list(range(400))
    for batch in batches:
        assert len(batch) == 1 or sum(costs[job] for job in batch) <= 2000


def test_budget_is_used_to_the_last_token() -> None:
    scheduler: Scheduler[str] = Scheduler(100)
    for job in "abc":
        scheduler.put(job, 50, 0.0)
    assert scheduler.take() == ["a", "b"]
    assert scheduler.take() == ["c"]


def test_cheap_jobs_go_first() -> None:
    scheduler: Scheduler[str] = Scheduler(1000)
    for job, cost in (("picture", 900), ("sentence", 40), ("word", 10)):
        scheduler.put(job, cost, 0.0)
    assert scheduler.take() == ["word", "sentence", "picture"]


def test_equal_jobs_keep_their_order_though_they_cannot_be_compared() -> None:
    scheduler: Scheduler[dict[str, int]] = Scheduler(1000)
    for number in range(20):
        scheduler.put({"number": number}, 10, 0.0)
    assert [job["number"] for job in scheduler.take()] == list(range(20))


def test_waiting_makes_up_for_cost() -> None:
    scheduler: Scheduler[str] = Scheduler(1)  # one job a batch
    head_start_s = 1280 * SECONDS_PER_TOKEN  # 0.256 s
    scheduler.put("picture", 1280, arrival_s=0.0)
    scheduler.put("too late to overtake", 0, arrival_s=head_start_s + 0.001)
    scheduler.put("in time", 0, arrival_s=head_start_s - 0.001)
    assert drain(scheduler) == [["in time"], ["picture"], ["too late to overtake"]]


def test_expensive_job_does_not_starve_under_endless_cheap_ones() -> None:
    """More comes than can be served, for ever: the picture still goes once it has waited out its cost."""
    scheduler: Scheduler[str] = Scheduler(1300)
    scheduler.put("picture", 1280, arrival_s=0.0)
    now_s, served_at_s = 0.0, None
    while served_at_s is None and now_s < 60:
        for _ in range(40):
            scheduler.put("query", 50, arrival_s=now_s)  # 2000 tokens a step against a budget of 1300
        if "picture" in scheduler.take():
            served_at_s = now_s
        now_s += 0.01
    # It stands before whoever comes 0.246 s (its 1280 tokens less a query's 50) later than it did. Until then 25 steps
    # brought 25 * 40 queries; at 26 a step those take 38.5 steps
    assert served_at_s is not None
    assert 0.24 < served_at_s < 0.40


def test_nobody_is_overtaken_by_who_came_later_than_its_cost_allows() -> None:
    generator = random.Random(1)
    scheduler: Scheduler[tuple[float, int]] = Scheduler(1000)
    served: list[tuple[int, float, int]] = []  # in which batch, arrival, cost
    for step in range(300):  # about 1000 tokens come a step, so the queue grows and shrinks
        for _ in range(generator.randint(0, 6)):
            arrival_s, cost = step * 0.01, generator.choice([20, 100, 900])
            scheduler.put((arrival_s, cost), cost, arrival_s)
        served += [(step, *job) for job in scheduler.take()]
    assert len({batch for batch, _, _ in served}) < len(served)
    for batch, arrival_s, cost in served:
        overtakers = [other for other in served if other[0] < batch and other[1] > arrival_s + cost * SECONDS_PER_TOKEN]
        assert not overtakers


@pytest.mark.parametrize("cost", [101, 5000])
def test_job_over_the_budget_goes_alone(cost: int) -> None:
    scheduler: Scheduler[str] = Scheduler(100)
    scheduler.put("large", cost, arrival_s=0.0)
    scheduler.put("before", 10, arrival_s=0.0)
    scheduler.put("after", 10, arrival_s=10.0)
    assert drain(scheduler) == [["before"], ["large"], ["after"]]


def test_small_job_does_not_slip_past_one_that_does_not_fit() -> None:
    scheduler: Scheduler[str] = Scheduler(100)
    scheduler.put("first", 60, arrival_s=0.0)
    scheduler.put("does not fit", 60, arrival_s=1.0)
    scheduler.put("would fit", 10, arrival_s=2.0)
    assert drain(scheduler) == [["first"], ["does not fit", "would fit"]]


def test_tokens_and_jobs_are_counted() -> None:
    scheduler: Scheduler[int] = Scheduler(100)
    assert (scheduler.num_tokens, len(scheduler), scheduler.take()) == (0, 0, [])
    for job, cost in enumerate((30, 60, 500)):
        scheduler.put(job, cost, 0.0)
    assert (scheduler.num_tokens, len(scheduler)) == (590, 3)
    assert scheduler.take() == [0, 1]
    assert (scheduler.num_tokens, len(scheduler)) == (500, 1)
    assert scheduler.take() == [2]
    assert (scheduler.num_tokens, len(scheduler)) == (0, 0)
