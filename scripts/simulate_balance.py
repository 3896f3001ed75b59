"""How evenly the grouped product's runs load many threads: a simulation of src/cpu/grouped_gemm/plan.rs.

Threads take runs of panels from one counter, as the crate does. A panel for a block of rows costs the longer of its two floors on one core
(reading it, multiplying it); --costs FILE replaces that by measured pairs `rows seconds`. Memory is taken to scale with threads, so this
shows balance alone. Prints the share of the threads' time that is work, for each number of threads.

    python3 scripts/simulate_balance.py [--load uniform|zipf] [--tokens 1,8,64,512] [--threads 2,16,96]
"""

import argparse
import bisect
import heapq
import random

MC, SHARE, SHORTEST, LANES = 96, 4, 2, 16  # as in plan.rs, AVX-512


def counts(tokens, experts, k, load, rng):
    """Rows of each expert."""
    weights = [1.0 / (e + 1) if load == "zipf" else 1.0 for e in range(experts)]
    rows = [0] * experts
    for _ in range(tokens):
        # Without replacement by weight: the k smallest of exponentials.
        keys = [(rng.expovariate(w), e) for e, w in enumerate(weights)]
        for _, e in heapq.nsmallest(k, keys):
            rows[e] += 1
    return rows


def units(rows, panels, cost):
    """Costs of all (block, panel) units, in the order of their numbers."""
    out = []
    for n in rows:
        blocks = -(-n // MC)
        for b in range(blocks):
            size = n * (b + 1) // blocks - n * b // blocks
            out += [cost(size)] * panels
    return out


def product(costs, threads):
    """When the last thread is done."""
    ends = [(0.0, t) for t in range(threads)]
    heapq.heapify(ends)
    at = 0
    while at < len(costs):
        left = len(costs) - at
        take = min(max(left // (SHARE * threads), SHORTEST), left)
        end, thread = heapq.heappop(ends)
        heapq.heappush(ends, (end + sum(costs[at : at + take]), thread))
        at += take
    return max(end for end, _ in ends)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--load", default="uniform", choices=["uniform", "zipf"])
    p.add_argument("--tokens", default="1,8,64,512,2048")
    p.add_argument("--threads", default="2,16,96")
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--intermediate", type=int, default=768)
    p.add_argument("--experts", type=int, default=128)
    p.add_argument("--top-k", type=int, default=8)
    p.add_argument("--bytes", type=int, default=2, help="of a weight")
    p.add_argument("--bandwidth", type=float, default=43e9, help="of one core")
    p.add_argument("--flops", type=float, default=560e9, help="of one core")
    p.add_argument("--costs", help="file of `rows seconds` for a panel of K = hidden")
    a = p.parse_args()
    measured = sorted(tuple(map(float, line.split())) for line in open(a.costs)) if a.costs else None

    def panel_cost(k):
        def cost(rows):
            if measured:
                i = min(bisect.bisect_left(measured, (rows, 0.0)), len(measured) - 1)
                return measured[i][1] * k / a.hidden
            n = 2 * LANES
            return max(n * k * a.bytes / a.bandwidth, 2 * rows * n * k / a.flops)

        return cost

    for tokens in map(int, a.tokens.split(",")):
        rows = counts(tokens, a.experts, a.top_k, a.load, random.Random(tokens))
        up = units(rows, a.intermediate // LANES, panel_cost(a.hidden))
        down = units(rows, a.hidden // (2 * LANES), panel_cost(a.intermediate))
        line = []
        for threads in map(int, a.threads.split(",")):
            ideal = (sum(up) + sum(down)) / threads
            time = product(up, threads) + product(down, threads)
            line.append(f"{threads:3} threads {100 * ideal / time:5.1f}%")
        print(f"T = {tokens:5}, {len(up) + len(down):6} units: " + ", ".join(line))


if __name__ == "__main__":
    main()
