"""Program of the process with an earlier version of the library: answers each line of JSON with a line.

`{"build": [arguments, options], "dtype": ..., "prompt": [[...]], "new": N}` builds a decoder-only model; `{}`
generates N tokens after the prompt and answers with their number.
"""

import json
import sys

import torch

from transformer import DecoderOnlyTransformer

torch.set_num_threads(int(sys.argv[1]))
generate = None

for line in sys.stdin:
    request = json.loads(line)
    if "build" in request:
        arguments, options = request["build"]
        model = DecoderOnlyTransformer(*arguments, **options).to(getattr(torch, request["dtype"])).eval()
        prompt, new = torch.tensor(request["prompt"]), request["new"]

        def generate(model=model, prompt=prompt, new=new):
            return model.generate(prompt, max_new_tokens=new).shape[1] - prompt.shape[1]

        answer = 0
    else:
        answer = generate()
    print(json.dumps(answer), flush=True)
