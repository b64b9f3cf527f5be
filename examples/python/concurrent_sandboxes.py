"""Fifty sandboxes at once over one client."""

from __future__ import annotations

import asyncio
import time

from zeroboot import AsyncSandbox


async def main() -> None:
    async with AsyncSandbox() as sandbox:
        begin = time.perf_counter()
        codes = [f"print(sum(range({n})))" for n in range(50)]
        results = await asyncio.gather(*(sandbox.run(code) for code in codes))
        for n, result in enumerate(results):
            assert result == str(sum(range(n))), (n, result)
        print(f"{len(results)} sandboxes in {time.perf_counter() - begin:.2f} s")

        # The same as one request. Each item has its own sandbox and its own result.
        batch = await sandbox.run_batch(codes[:10])
        print(", ".join(batch))


asyncio.run(main())
