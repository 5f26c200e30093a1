"""A vocabulary that is sharded over two processes gives what the whole one gives."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from ppo_kernels import distributed, functional

ROWS, HIDDEN, VOCAB = (3, 5), 16, 301
# Where the second process's columns begin: evenly, unevenly, in one process.
BOUNDS = [150, 17, 0, VOCAB]
OPTIONS = [{}, {"temperature": 0.7}, {"ignore_index": -100, "temperature": 1.3}]
HEAD = [{}, {"logit_scale": 0.5, "softcap": 3.0}]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def run(rank, file):
    init = f"file://{file}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.manual_seed(5)
    for bound in BOUNDS:
        columns = slice(0, bound) if rank == 0 else slice(bound, VOCAB)
        for options in OPTIONS:
            index = torch.randint(VOCAB, ROWS)
            if "ignore_index" in options:
                index[0, :2] = -100
            upstream = torch.randn(2, *ROWS).unbind()
            logits = (3 * torch.randn(*ROWS, VOCAB)).requires_grad_()
            shard = logits.detach()[..., columns].requires_grad_()
            ours = distributed.vocab_parallel_logprobs(shard, index, **options)
            whole = functional.logprobs_and_entropy(logits, index, **options)
            agree(ours, whole, upstream, [shard], [logits], [(..., columns)])
            for more in HEAD:
                tensors = torch.randn(*ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN) / 2
                tensors = [x.requires_grad_() for x in (*tensors, torch.randn(VOCAB))]
                hidden, weight, bias = tensors
                outputs = {"outputs": ["entropy"], **options, **more}
                whole = functional.linear_logprobs(hidden, weight, index, bias, **outputs)
                parts = [x.detach()[columns].requires_grad_() for x in (weight, bias)]
                own = hidden.detach().requires_grad_()
                ours = distributed.vocab_parallel_linear_logprobs(
                    own, parts[0], index, parts[1], **options, **more
                )
                places = [..., columns, columns]
                agree(ours[:2], whole[:2], upstream, [own, *parts], tensors, places)
    refused(rank)
    under_autocast()
    dist.destroy_process_group()


def under_autocast():
    hidden, weight = torch.randn(6, HIDDEN), torch.randn(40, HIDDEN)
    columns = slice(0, 25) if dist.get_rank() == 0 else slice(25, 40)
    index = torch.randint(40, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = distributed.vocab_parallel_linear_logprobs(hidden, weight[columns], index)
        whole = functional.linear_logprobs(hidden, weight, index, outputs=["entropy"])
    for a, b in zip(ours[:2], whole[:2]):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def agree(ours, whole, upstream, leaves, whole_leaves, places):
    for a, b in zip(ours, whole):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        both = [torch.empty_like(a) for _ in range(2)]
        dist.all_gather(both, a.detach().contiguous())
        assert torch.equal(*both), "all processes have the same bits"
    found = torch.autograd.grad(ours, leaves, upstream)
    wanted = torch.autograd.grad(whole, whole_leaves, upstream)
    for a, b, place in zip(found, wanted, places):
        b = b[place]
        assert a.shape == b.shape and (not a.numel() or relative(a, b) < 1e-6)


def refused(rank):
    """By all processes, also where the fault, or a column, is one's alone: none is left waiting."""
    logits, index = torch.zeros(2, 5 + rank), torch.tensor([0, 11])
    with pytest.raises(ValueError, match=r"`index`\[1\] is 11, expected 0..11"):
        distributed.vocab_parallel_logprobs(logits, index)
    empty = torch.zeros(2, 5 - 5 * rank)
    with pytest.raises(ValueError, match=r"`index`\[1\] is 11, expected 0..5"):
        distributed.vocab_parallel_logprobs(empty, index)
    with pytest.raises(ValueError, match="option `temperature` is 0.0"):
        distributed.vocab_parallel_logprobs(empty, index, temperature=0.0)
    head = torch.zeros(2, 4), torch.zeros(5 - 5 * rank, 4)
    with pytest.raises(ValueError, match=r"`index`\[1\] is 11, expected 0..5"):
        distributed.vocab_parallel_linear_logprobs(*head, index)
    said = ["`index` has shape", "refused by process 0"]
    with pytest.raises(ValueError, match=said[rank]):
        wrong = torch.zeros(3 - rank, dtype=torch.int64)
        distributed.vocab_parallel_logprobs(logits, wrong)
    said = ["`weight` has shape", "refused by process 0"]
    with pytest.raises(ValueError, match=said[rank]):
        weight = torch.zeros(5, 3 + rank)
        distributed.vocab_parallel_linear_logprobs(torch.zeros(2, 4), weight, index)
    # Ids of 32 bits, and results that are changed in place.
    logits = torch.zeros(3, 5, requires_grad=True)
    index = torch.tensor([1, -100, 2], dtype=torch.int32)
    for ours in (
        distributed.vocab_parallel_logprobs(logits, index, ignore_index=-100),
        distributed.vocab_parallel_linear_logprobs(
            logits, torch.ones(5, 5), index, ignore_index=-100
        )[:2],
    ):
        logp, entropy = (x.mul_(2) for x in ours)
        assert logp[1] == entropy[1] == 0
        (logp + entropy).sum().backward()
        assert (logits.grad[1] == 0).all()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run, (tmp_path / "rendezvous",), nprocs=2)
