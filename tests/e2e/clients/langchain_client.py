"""LangChain's OpenAI integration: a completion, and the class by which it recognises a prompt that is too long."""

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI

from tests.e2e.clients.arguments import read, report

given = read()
common = {"base_url": f"{given.url}/v1", "api_key": "none", "model": given.model, "max_retries": 0}
text = OpenAI(**common, temperature=0, max_tokens=given.num_tokens).invoke(given.prompt)
overflow = ""
try:
    ChatOpenAI(**common).invoke(given.prompt * 1000)
except ContextOverflowError as error:
    overflow = type(error).__name__
report(text=text, overflow=overflow)
