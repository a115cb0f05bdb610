"""One answer of the engine on a model folder, as JSON:  python -m tests.e2e.generate_once FOLDER PROMPT_IDS PREFILL_IDS"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rl.settings import RolloutSettings
from rollout.engine import Engine
from tests.builders import make_lease, make_prompt


def main() -> None:
    folder, prompt, prefill = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
    settings = RolloutSettings(kv_cache_gb=0.1, max_length=160, max_concurrent=4)
    lease = make_lease(prompt=make_prompt(token_ids=prompt), prefill_ids=tuple(prefill))
    (rollout,) = Engine(folder, settings, dtype="float32", max_prompt_length=32, seed=0).generate([lease])
    print(json.dumps({"response_ids": rollout.response_ids, "logp": rollout.logp_T}))


if __name__ == "__main__":
    main()
