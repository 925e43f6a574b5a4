"""Let a model call two functions of Python, until it answers.

    edge-demo serve my-bundle
    python examples/call_functions.py "What is 17 plus 25?"

The server is one of OpenAI's protocol; the client is OpenAI's own. The calls keep to the
functions' schemas, whatever the model is. Small models are seldom right about when to call.
"""

import argparse
import datetime
import json

import openai


def add(a: float, b: float) -> float:
    return a + b


def day_of_week(date: str) -> str:
    try:
        return datetime.date.fromisoformat(date).strftime("%A")
    except ValueError as error:
        return f"error: {error}"


FUNCTIONS = {"add": add, "day_of_week": day_of_week}
NUMBER = {"type": "number"}
DATE = {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"}
PARAMETERS = {"add": {"a": NUMBER, "b": NUMBER}, "day_of_week": {"date": DATE}}
DESCRIPTIONS = {"add": "Add two numbers.", "day_of_week": "The day of the week of a date."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": DESCRIPTIONS[name],
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
        },
    }
    for name, properties in PARAMETERS.items()
]
MOST_ROUNDS = 4
MOST_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--key", default="none", help="the server's API key, if it has one")
    arguments = parser.parse_args()

    client = openai.OpenAI(base_url=arguments.url, api_key=arguments.key)
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": arguments.question}]
    choice = "required"  # a model of 270M parameters would rather talk
    for _ in range(MOST_ROUNDS):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            temperature=0,
            max_tokens=MOST_TOKENS,
        )
        message = answer.choices[0].message
        if answer.choices[0].finish_reason == "length":  # a call may be cut
            print(f"no end after {MOST_TOKENS} tokens: {message.content}")
            return
        messages.append(message)
        if not message.tool_calls:
            print(message.content)
            return
        for call in message.tool_calls:
            given = json.loads(call.function.arguments)
            result = json.dumps(FUNCTIONS[call.function.name](**given))
            print(f"{call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        choice = "auto"
    print(f"after {MOST_ROUNDS} rounds of calls there is no answer yet")


if __name__ == "__main__":
    main()
