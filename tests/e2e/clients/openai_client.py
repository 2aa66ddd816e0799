"""OpenAI's client, of any major version: models, completions and chats, whole and streamed, and its classes of errors."""

from typing import Any

import openai

from tests.e2e.clients.arguments import read, report

given = read()
client: Any = openai.OpenAI(base_url=f"{given.url}/v1", api_key="none", max_retries=0)
asked = {"model": given.model, "prompt": given.prompt, "max_tokens": given.num_tokens, "temperature": 0}
whole = client.completions.create(**asked)
streamed = "".join(event.choices[0].text for event in client.completions.create(**asked, stream=True))
messages = [{"role": "user", "content": given.prompt}]
chat = client.chat.completions.create(model=given.model, messages=messages, max_tokens=4)
with client.chat.completions.create(model=given.model, messages=messages, max_tokens=4, stream=True) as stream:
    reasons = [choice.finish_reason for event in stream for choice in event.choices if choice.finish_reason]
code = unknown = ""
try:
    client.chat.completions.create(model=given.model, messages=[{"role": "user", "content": given.prompt * 1000}])
except openai.BadRequestError as error:
    code = str(error.code)
try:
    client.chat.completions.create(model="nobody", messages=messages)
except openai.NotFoundError as error:
    unknown = str(error.code)
report(
    version=openai.__version__,
    models=[model.id for model in client.models.list()],
    whole=whole.choices[0].text,
    streamed=streamed,
    num_tokens=chat.usage.completion_tokens,
    reasons=reasons,
    overflow=code,
    unknown=unknown,
)
