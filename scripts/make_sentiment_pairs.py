"""Make the sentiment task's preference pairs: the default model's own sentences, the better one chosen by the reward.

    python scripts/make_sentiment_pairs.py

Six continuations of every prompt are sampled at temperature 1 from the whole distribution, at most 28 new tokens, and cut
at the end of a sentence (`locum.tasks.sentiment.sentence`). Left out are those without one, those whose first token
would merge with the prompt's last one, and those with a crude word. The best and the worst by reward make a pair when
they are at least 0.3 apart. Labels are hard: the higher reward is the chosen one, always.

Samples go to a file in --work, a line per batch of prompts, each batch with a seed of its own; a run that was killed
goes on behind the last whole line. The same seed, batch size and versions give the same pairs.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from rich.progress import track

from locum.models import load
from locum.tasks import sentiment


def sample(args: argparse.Namespace) -> list[dict]:
    """Every prompt with its raw continuations, in the order of the prompts."""
    store = Path(args.work) / f"samples-{args.seed}.jsonl"
    store.parent.mkdir(parents=True, exist_ok=True)
    kept = store.read_text("utf-8").splitlines(keepends=True) if store.exists() else []
    done = [json.loads(line) for line in kept if line.endswith("\n")]
    store.write_text("".join(kept[: len(done)]), "utf-8")  # without a last line that was cut off
    texts = sentiment.prompts() + sentiment.prompts(held_out=True)
    batches = [texts[i : i + args.batch] for i in range(0, len(texts), args.batch)]
    if len(done) == len(batches):
        return [row for batch in done for row in batch]
    lm = load("smollm2-135m-instruct", dtype=torch.float32, device="cpu")
    tokenizer = lm.tokenizer
    tokenizer.padding_side = "left"
    with store.open("a", encoding="utf-8") as file:
        for i in track(range(len(done), len(batches)), "sampling"):
            torch.manual_seed(args.seed * 100_003 + i)
            inputs = tokenizer(batches[i], return_tensors="pt", padding=True)
            out = lm.model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=sentiment.NEW_TOKENS,
                num_return_sequences=args.samples,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            rows = [
                {"prompt": prompt, "samples": new[j * args.samples : (j + 1) * args.samples]}
                for j, prompt in enumerate(batches[i])
            ]
            file.write(json.dumps(rows, ensure_ascii=False) + "\n")
            file.flush()
            done.append(rows)
    return [row for batch in done for row in batch]


CRUDE = re.compile(
    r"(?i)\b(sex|porn|nud[ei]|rape|raping|rapist|naked|nazi|suicid|fuck|shit|bitch|whore|slut|dick|cock\b|cum\b|nigg|retard)"
)


def usable(tokenizer, prompt: str, text: str) -> str | None:
    """The sample as a response, or None where it cannot be one."""
    response = sentiment.sentence(text)
    if response is None or "\ufffd" in response or CRUDE.search(response):
        return None
    ids = tokenizer(prompt)["input_ids"]
    return response if tokenizer(prompt + response)["input_ids"][: len(ids)] == ids else None


def pair(tokenizer, row: dict, margin: float) -> dict | None:
    """The best and the worst usable sample, if they are clearly apart; of equals the one sampled first."""
    texts = [t for t in (usable(tokenizer, row["prompt"], s) for s in row["samples"]) if t]
    scored = list(zip(sentiment.rewards(texts), texts, strict=True))
    if not scored:
        return None
    (high, chosen), (low, rejected) = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if high - low < margin:
        return None
    return {
        "prompt": row["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "reward_chosen": high,
        "reward_rejected": low,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/sentiment", help="where samples are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=6, help="continuations of each prompt")
    parser.add_argument("--batch", type=int, default=8, help="prompts sampled at the same time")
    parser.add_argument("--margin", type=float, default=0.3, help="least difference of rewards in a pair")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = sample(args)
    tokenizer = load("smollm2-135m-instruct", device="cpu").tokenizer
    for held_out, path in enumerate(sentiment.files()):
        mine = set(sentiment.prompts(held_out=bool(held_out)))
        made = [p for row in rows if row["prompt"] in mine and (p := pair(tokenizer, row, args.margin))]
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in made), "utf-8")
        print(f"{path.name}: {len(made)} pairs for {len(mine)} prompts")


if __name__ == "__main__":
    main()
