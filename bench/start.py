"""Prints, as JSON, the seconds that a fresh process takes until it trains: stage by stage.

python bench/start.py FOLDER SIZE BATCH TASK ARCH
"""

import json
import sys
import time

began = time.perf_counter()
seconds = {}


def done(stage: str) -> None:
    """Note how long a stage took, from the one before it."""
    seconds[stage] = time.perf_counter() - began - sum(seconds.values())


if __name__ == "__main__":
    folder, size, bs, task, arch = sys.argv[1:]
    from selfsup_fastai.data.images import UnlabeledDataLoaders
    from selfsup_fastai.pretext.learner import pretext_learner

    done("imports")
    dls = UnlabeledDataLoaders.from_folder(folder, size=int(size), bs=int(bs))
    done("loaders made")
    learn = pretext_learner(dls, task, arch)
    done("learner made")
    learn.dls.train.one_batch()
    done("first batch")
    print(json.dumps(seconds))
