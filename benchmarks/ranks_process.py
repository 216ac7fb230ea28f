"""Program of one of the processes that share a model: answers each line of JSON with a line.

Arguments: its rank, how many there are, and the file where they meet. `{"build": [arguments, options], "held": N}`
builds a decoder-only model whose cache holds N tokens; `{}` reads one more token; `{"forget": N}` goes back to N.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from transformer import DecoderOnlyTransformer
from transformer.parallel import parallelize

rank, number = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
if number > 1:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=number)
model = token = None

for line in sys.stdin:
    request = json.loads(line)
    with torch.no_grad():
        if "build" in request:
            arguments, options = request["build"]
            torch.manual_seed(0)
            model = DecoderOnlyTransformer(*arguments, **options).eval()
            if number > 1:
                parallelize(model, init_device_mesh("cpu", (number,)))
            ids = torch.randint(arguments[0], (1, request["held"] + 1))
            token = ids[:, -1:]
            model.enable_cache()(ids[:, :-1])
        elif "forget" in request:
            model.kv_cache.truncate(request["forget"])
        else:
            model(token)
    print(json.dumps(0), flush=True)
