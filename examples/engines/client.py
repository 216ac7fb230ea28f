"""Client of a server that speaks the protocol of OpenAI, such as `vllm serve` and `transformers serve`.

    python examples/engines/client.py --model composed --prompt "        self._"

`finetune.py` says how a server is started with a saved folder. The text is printed as it comes.
"""

import argparse
import time

from transformer.extras import require


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a server of this machine continue a text.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(default: %(default)s)")
    parser.add_argument("--model", required=True, help="the folder, as the server was given it")
    parser.add_argument("--prompt", default="        self._", help="(default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest tokens (default: %(default)s)")
    options = parser.parse_args()
    require("examples", "openai")
    import openai

    # Servers that were started without a key accept any.
    client = openai.OpenAI(base_url=options.url, api_key="none", max_retries=0)
    began, pieces = time.perf_counter(), 0
    print(options.prompt, end="", flush=True)
    try:
        answer = client.completions.create(
            model=options.model,
            prompt=options.prompt,
            max_tokens=options.tokens,
            temperature=options.temperature,
            stream=True,
        )
        for piece in answer:
            print(piece.choices[0].text if piece.choices else "", end="", flush=True)
            pieces += 1
    except openai.OpenAIError as error:
        raise SystemExit(f"\n{options.url}: expected a server with the model {options.model!r} ({error})") from error
    print(f"\n\n{pieces} pieces in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
