"""A running `shnet serve` under load: `python -m tests.load http://127.0.0.1:8765`.

Clients send pages, single queries, batches and bad requests at the same time; every answer is compared with the one
that the same request gets alone.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shnet_jax.observe.terminal import make_output_safe
from tests.patience import PATIENCE

WORDS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "circle", "square")]


def get(url: str, body: bytes | None = None, **query: Any) -> tuple[int, str]:
    """(status, text) of a request; body: of a POST."""
    url += f"?{urllib.parse.urlencode(query)}" if query else ""
    try:
        with urllib.request.urlopen(url, body, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def get_json(*args: Any, **query: Any) -> tuple[int, Any]:
    status, text = get(*args, **query)
    return status, json.loads(text)


def mixed_requests(address: str) -> list[Callable[[], bool]]:
    """Ten requests that say whether they were answered rightly; half of them are single queries."""
    expected = {query: get_json(f"{address}/search", q=query, k=1)[1]["hits"][0]["image_id"] for query in WORDS}

    def single(query: str) -> bool:
        return get_json(f"{address}/search", q=query, k=1)[1]["hits"][0]["image_id"] == expected[query]

    def batch(queries: list[str]) -> bool:
        status, answer = get_json(f"{address}/search", json.dumps({"queries": queries, "k": 1}).encode())
        return status == 200 and [r["hits"][0]["image_id"] for r in answer["results"]] == [
            expected[query] for query in queries
        ]

    name = urllib.parse.quote(expected[WORDS[0]], safe="")
    return [
        lambda: get(f"{address}/image/{name}")[0] == 200,
        lambda: get(f"{address}/", q=WORDS[1])[0] == 200,
        lambda: get(f"{address}/search", q="")[0] == 400,
        *(lambda i=i: batch([WORDS[i], *WORDS[3:6]]) for i in (0, 7)),  # type: ignore[misc]
        *(lambda i=i: single(WORDS[i]) for i in (0, 2, 4, 6, 8)),  # type: ignore[misc]
    ]


def under_load(address: str, requests: int = 1000, clients: int = 16) -> tuple[int, list[float]]:
    """The number of requests that were answered rightly, and the seconds of each, ascending."""
    mix = mixed_requests(address)

    def one(number: int) -> tuple[bool, float]:
        start = time.perf_counter()
        return mix[number % len(mix)](), time.perf_counter() - start

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, range(requests)))
    return sum(right for right, _ in answers), sorted(seconds for _, seconds in answers)


def main() -> int:
    """Prints how many answers were right, and the time that half of them and 99 % of them took at most."""
    make_output_safe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    given = parser.parse_args()
    start = time.perf_counter()
    right, seconds = under_load(given.address, given.requests, given.clients)
    rate = given.requests / (time.perf_counter() - start)
    half, most = (1e3 * seconds[int(share * (given.requests - 1))] for share in (0.5, 0.99))
    print(f"{right} of {given.requests} right, {rate:.0f} requests/s, p50 {half:.0f} ms, p99 {most:.0f} ms")
    return right != given.requests


if __name__ == "__main__":
    raise SystemExit(main())
