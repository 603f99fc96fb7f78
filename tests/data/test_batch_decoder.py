"""Batched decoding against the model asked one row at a time, and the law of its samples."""

import random

import pytest
import torch
from tiny import tiny_model

from fledge.data.batch_decoder import BatchDecoder, Job, nucleus, prefill_groups, sample

EOS = 3


def greedy_alone(model, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """The slow truth: a whole forward per token, no cache, no batch."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + max_new_tokens:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt_ids) :]


def decode(model, jobs: list[Job], batch_size: int) -> None:
    decoder = BatchDecoder(model, eos_token_ids=[EOS], batch_size=batch_size)
    waiting = list(jobs)
    while waiting or decoder.num_live:
        if waiting and decoder.wants_more():
            free = decoder.num_free
            decoder.admit(waiting[:free])
            del waiting[:free]
        decoder.step()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_rows_that_join_and_leave_get_the_answers_they_get_alone(name):
    model, draw = tiny_model(name), random.Random(0)
    jobs = [
        Job([draw.randrange(4, 100) for _ in range(draw.randint(2, 30))], draw.randint(1, 25), 0.0, 1.0, 0)
        for _ in range(12)
    ]
    decode(model, jobs, batch_size=6)
    assert [job.output_ids for job in jobs] == [greedy_alone(model, j.prompt_ids, j.max_new_tokens) for j in jobs]
    assert all((job.finish_reason == "stop") == (job.output_ids[-1] == EOS) for job in jobs)
    assert len({tuple(job.output_ids) for job in jobs}) > 8  # the check could fail


def test_a_row_samples_the_same_in_any_company():
    model = tiny_model("llama")
    jobs = [Job([5, 6, 7 + i % 3], 12, 1.0, 0.9, seed=i) for i in range(9)]
    again = [Job(job.prompt_ids, 12, 1.0, 0.9, job.seed) for job in jobs]
    decode(model, jobs, batch_size=9)
    decode(model, again[::-1], batch_size=2)
    assert [job.output_ids for job in jobs] == [job.output_ids for job in again]
    other = Job(jobs[0].prompt_ids, 12, 1.0, 0.9, seed=99)
    decode(model, [other], batch_size=1)
    assert other.output_ids != jobs[0].output_ids


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = [(i + 0.5) / 4000 for i in range(4000)]
    counts = torch.bincount(
        torch.tensor(sample(logits.expand(4000, -1), [0.5] * 4000, [1.0] * 4000, draws)), minlength=4
    )
    assert torch.allclose(counts / 4000, torch.softmax(logits[0] / 0.5, -1), atol=1e-3)
    cut = torch.bincount(torch.tensor(sample(logits.expand(4000, -1), [1.0] * 4000, [0.8] * 4000, draws)), minlength=4)
    assert cut[0] == cut[3] == 0 and abs(cut[2] / cut[1] - torch.e) < 0.02
    assert sample(logits, [0.0], [0.1], [0.999]) == [2]


def test_nucleus_falls_back_to_all_tokens_when_the_candidates_are_too_few():
    flat = torch.full((4096,), 1 / 4096)
    assert int((nucleus(flat, 0.5) > 0).sum()) == 2048
    assert int((nucleus(flat, 0.01) > 0).sum()) == 41


def test_prefill_groups_hold_every_job_and_waste_little():
    jobs = [Job([1] * length, 1, 0.0, 1.0, 0) for length in (3000, 10, 900, 12, 1000, 11)]
    groups = prefill_groups(jobs)
    assert [[len(job.prompt_ids) for job in group] for group in groups] == [[10, 11, 12], [900, 1000], [3000]] or [
        [len(job.prompt_ids) for job in group] for group in groups
    ] == [[10, 11, 12], [900], [1000], [3000]]
