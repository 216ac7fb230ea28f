"""Program of the process with CTranslate2: answers each line of JSON with a line.

The first, `{"kind": "Generator", "folder": ..., "settings": {...}, "rows": [...], "options": {...}}`, loads a model;
`{}` does its work on the rows. Generators and translators answer with tokens, encoders with the number of rows, or with
the states where the request says `"states": true`.
"""

import json
import sys

import ctranslate2

model = rows = options = kind = None

for line in sys.stdin:
    request = json.loads(line)
    if "kind" in request:
        kind, rows, options = request["kind"], request["rows"], request["options"]
        model = getattr(ctranslate2, kind)(request["folder"], **request["settings"])
        answer = 0
    elif kind == "Generator":
        answer = [result.sequences_ids[0] for result in model.generate_batch(rows, **options)]
    elif kind == "Translator":
        answer = [result.hypotheses[0] for result in model.translate_batch(rows, **options)]
    else:
        states = model.forward_batch(rows).last_hidden_state
        answer = len(rows)
        if request.get("states"):
            import numpy

            answer = numpy.array(states).tolist()
    print(json.dumps(answer), flush=True)
