"""Which movies does a user like? Learned from likes alone, where no answer does not mean no.

    python examples/movies.py

Every user has a taste, and every movie a character and a popularity. Users see popular movies first
and tell which of those they like; of all others nothing is known. Two models of the same size learn
from these likes, and are asked which of the movies that a user has not seen she would like best:

- "unknown as negative": all that is not liked is a negative, as in an ordinary multi-label loss.
  Such a model learns what is seen, and so mostly what is popular.
- "unknown as missing": for every like (user A, movie 2), the same movie becomes a negative of some
  random users B, and of row B nothing but that is known: the loss has a mask, here as
  ``SparseLabels(observed_only=True)``. Each movie has as many negatives as likes, times a constant,
  so its popularity is no evidence.

Users and movies are generated, so that the truth about unseen movies is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import SparseLabels, sampling

TASTES = 8  # dimensions of taste
NEGATIVES = 4  # users drawn for every like


class World(NamedTuple):
    """Users and movies, ``[users, movies]`` each.

    Attributes:
        likes: what users would say of each movie, seen or not.
        seen: which movies they have seen.
    """

    likes: Tensor
    seen: Tensor

    @property
    def known(self) -> Tensor:
        """The likes that a model may learn from."""
        return self.likes & self.seen


def make_world(users: int, movies: int, generator: torch.Generator) -> World:
    """Draw tastes, characters, popularities, and what follows from them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    affinity = normal(users, TASTES) @ normal(movies, TASTES).t() / TASTES**0.5
    likes = uniform(users, movies) < torch.sigmoid(3 * affinity - 1)
    popularity = 0.02 + 0.5 * torch.linspace(0, 1, movies) ** 6
    seen = uniform(users, movies) < popularity[torch.randperm(movies, generator=generator)]
    return World(likes, seen)


def listed(labels: Tensor) -> SparseLabels:
    """Bool ``[N, C]`` as lists."""
    offsets = torch.nn.functional.pad(labels.sum(1).cumsum(0), (1, 0))
    return SparseLabels(labels.nonzero()[:, 1], offsets)


def train(
    world: World, make_target: Callable[[Tensor], SparseLabels], steps: int, seed: int
) -> Tensor:
    """Learn a vector for each user and each movie; return all logits ``[users, movies]``."""
    torch.manual_seed(seed)
    users, movies = world.likes.shape
    tastes = torch.nn.Embedding(users, TASTES)
    head = torch.nn.Linear(TASTES, movies)
    parameters = [*tastes.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(steps):
        rows = torch.randint(users, (256,))
        loss = mlloss_cuda.linear_sigmoid_cross_entropy(
            tastes(rows), head.weight, make_target(world.known[rows]), head.bias
        )
        decay = sum(parameter.square().sum() for parameter in parameters)
        optimizer.zero_grad()
        (loss + 1e-5 * decay).backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = head(tastes.weight)
    return logits


def liked_share(world: World, logits: Tensor, k: int = 10) -> float:
    """How many of the k unseen movies with the largest logits a user likes, mean over users."""
    best = logits.masked_fill(world.seen, -torch.inf).topk(k, dim=1).indices
    return world.likes.gather(1, best).float().mean().item()


def compare(users: int, movies: int, steps: int, seed: int) -> dict[str, float]:
    """Train both models; return the share of likes among their recommendations, and by chance."""
    world = make_world(users, movies, torch.Generator().manual_seed(seed))
    draws = torch.Generator().manual_seed(seed)
    negative = train(world, listed, steps, seed)
    missing = train(
        world,
        lambda known: sampling.sample_rows(listed(known), NEGATIVES, generator=draws),
        steps,
        seed,
    )
    return {
        "by chance": world.likes[~world.seen].float().mean().item(),
        "unknown as negative": liked_share(world, negative),
        "unknown as missing": liked_share(world, missing),
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("users", 2000), ("movies", 500), ("steps", 600), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print("Of the ten unseen movies that are recommended, a user likes")
    for name, share in compare(given.users, given.movies, given.steps, given.seed).items():
        print(f"  {name:20}  {share:6.1%}")


if __name__ == "__main__":
    main()
