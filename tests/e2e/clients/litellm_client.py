"""litellm as OpenAI's client: a completion, and the class by which its fallbacks recognise a prompt that is too long."""

import litellm

from tests.e2e.clients.arguments import read, report

given = read()
common = {"api_base": f"{given.url}/v1", "api_key": "none", "num_retries": 0}
answer = litellm.text_completion(
    model=f"text-completion-openai/{given.model}",
    prompt=given.prompt,
    max_tokens=given.num_tokens,
    temperature=0,
    **common,
)
overflow = unknown = ""
try:
    litellm.completion(
        model=f"openai/{given.model}", messages=[{"role": "user", "content": given.prompt * 1000}], **common
    )
except litellm.ContextWindowExceededError as error:
    overflow = type(error).__name__
try:
    litellm.completion(model="openai/nobody", messages=[{"role": "user", "content": "hi"}], **common)
except litellm.NotFoundError as error:
    unknown = type(error).__name__
report(text=answer.choices[0].text, overflow=overflow, unknown=unknown)
