"""How work is dealt out to the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

from hydra_ppo.errors import ConfigError


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Deal out pieces of work so that nobody waits long: the largest first, each to who has least so far.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies", section 3: the last is done after at most 4/3 - 1/(3n) of
    the shortest possible time.

    Args:
        costs: of each piece, such as its tokens.
        size: processes.

    Returns:
        For each process the numbers of its pieces, in the order of `costs`. Two pieces on two processes are the first on
        the first and the second on the second where the first is not the smaller one.
    """
    hands: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):  # stable, so equal ones stay in order
        least = min(range(size), key=lambda hand: (loads[hand], len(hands[hand]), hand))
        hands[least].append(number)
        loads[least] += costs[number]
    return [sorted(hand) for hand in hands]


def deal_in_rounds(costs: Sequence[float], size: int) -> list[list[int | None]]:
    """Deal out pieces of work where all processes do one at a time together: equal numbers of them, alike in size.

    Returns:
        For each process the numbers of its pieces, as many for everyone; None is a round in which it has none.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    rounds = [order[start : start + size] for start in range(0, len(order), size)]
    return [[turn[hand] if hand < len(turn) else None for turn in rounds] for hand in range(size)]


def check_divides(size: int, **settings: int) -> None:
    """Refuse numbers of rows that cannot be shared out evenly.

    Args:
        size: processes.
        settings: rows by the name of the setting, `__` for a dot.

    Raises:
        ConfigError: naming the setting and what would do.
    """
    for name, rows in settings.items():
        if rows % size:
            fitting = [number for number in range(1, rows + 1) if rows % number == 0]
            counts = ", ".join(map(str, fitting[:-1])) + f" or {fitting[-1]}" if len(fitting) > 1 else "1"
            raise ConfigError(
                f"WORLD_SIZE={size} does not divide {name.replace('__', '.')}={rows}, so processes would wait for others; "
                f"start {counts} of them, or choose a multiple of {size}."
            )
