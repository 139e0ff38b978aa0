"""What a client that streams is sent: server-sent events, as text is final.

`POST /v1/chat/completions` and `POST /v1/completions` with `"stream": true`:

    data: {"id": ..., "object": "chat.completion.chunk", "created": ...,
           "model": ..., "choices": [{"index": 0, "delta": {"content": "To be"},
           "finish_reason": null, "logprobs": null}]}

    data: [DONE]

A chunk comes as soon as the text from the left is final; the first one of a
chat's choice carries the role, the last one of a choice its `finish_reason`
("stop" or "length"). Completions have `"object": "text_completion"` and
`"choices": [{"index": 0, "text": "To be", ...}]`. What goes wrong afterwards is
a last chunk `data: {"error": {"message", "type", "param", "code"}}`.

With `"stream_drafts": true` besides, each network call adds the canvas as it
is, an event of its own:

    event: draft
    data: {"id": ..., "object": "dllm.draft", "choices": [], "index": 0,
           "call": 3, "slots": [{"text": "To", "p": 0.93},
           {"text": null, "p": null}, ...]}

- `index`: the choice; `call`: the network calls of this choice so far, from 1.
- `slots`: the row from the first slot that is to be filled, without the prompt
  before it; what was given after it (a suffix, an infill's text) is there too.
- `text`: of the token in the slot, by itself; null where the slot is still
  masked. It may be replaced in later drafts, where the policy revises.
- `p`: the probability of that token at the call that committed it, in [0, 1];
  null where the slot is masked or was given.

The last draft of a choice shows it whole, or up to what ended it. Drafts are
what a slow reader misses first: each one is whole, so the next makes up for it.
`choices` is empty so that clients that know nothing of drafts find none.

With `"stream_options": {"include_usage": true}` a chunk before the last has
`"choices": []` and `"usage": {"prompt_tokens", "completion_tokens",
"total_tokens", "prompt_tokens_details": {"cached_tokens"}, "network_calls"}`.
"""
