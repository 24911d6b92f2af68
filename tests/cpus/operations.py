"""What models, merges and statistics are made of, one operation each, as digests that no CPU may change."""

from alignmerge.engine.kernels import fix

fix()

import hashlib

import numpy as np
import torch
from torch.nn import functional

from alignmerge.engine.merger import Block, average, step
from baselines.ties import Cut, Ties


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def main() -> None:
    torch.set_num_threads(1)
    normal = torch.Generator().manual_seed(0)
    a, b = torch.randn(96, 130, generator=normal), torch.randn(130, 67, generator=normal)
    q, k, v = torch.randn(3, 2, 4, 33, 16, generator=normal)
    symmetric = (a @ a.T).double() + 10 * torch.eye(96, dtype=torch.float64)
    found = {
        "matmul": a @ b,
        "bmm": torch.bmm(q[0], k[0].transpose(1, 2)),
        "linear": functional.linear(a, b.T),
        "softmax": a.softmax(-1),
        "log_softmax": a.log_softmax(-1),
        "sdpa": functional.scaled_dot_product_attention(q, k, v),
        "gelu": functional.gelu(a),
        "silu": functional.silu(a),
        "tanh": a.tanh(),
        "exp": a.exp(),
        "rsqrt": a.square().add(1e-6).rsqrt(),
        "pow": a.abs().pow(1.7),
        "sum": a.sum(0),
        "mean": a.mean(-1),
        "norm": torch.linalg.vector_norm(a, dim=-1),
        "eigenvalues": torch.linalg.eigh(symmetric).eigenvalues,
        "eigenvectors": torch.linalg.eigh(symmetric).eigenvectors,
        "float64 matmul": a.double() @ b.double(),
        "randn": torch.randn(1000, generator=normal),
    }
    base, *pool = torch.randn(4, 5000, generator=normal)
    block, cuts = Block("w", slice(None), base, pool), [Cut(0.3), Cut(1.0), Cut(0.0)]
    found |= {
        "average": average(pool),
        "step": step(base, pool, 0.7),
        "ties": Ties(scale=0.7)._merged(block, cuts, 1.0, None),
    }
    for name, tensor in found.items():
        print(name, digest(tensor.numpy()))
    x = a.numpy()
    print("numpy matmul", digest(x @ b.numpy()), "mean", digest(x.mean(0)), "exp", digest(np.exp(x)))


if __name__ == "__main__":
    main()
