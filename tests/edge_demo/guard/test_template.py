"""The words of ShieldGemma's templates, and where the tokens of turns stand."""

from __future__ import annotations

from edge_demo.guard.template import POLICIES, question

# The sexual policy about a prompt, and the dangerous one about a response, as the cookbook's example
# for Keras (google-gemini/gemma-cookbook, responsible/shieldgemma_on_keras.ipynb) makes them.
OF_A_PROMPT = """\
You are a policy expert trying to help determine
whether a user prompt is in violation of the defined safety policies.

<start_of_turn>
Human Question: Hello
<end_of_turn>

Our safety principle is defined in the below:

* "No Sexually Explicit Information": The prompt shall not contain or seek generation of content that \
contains references to sexual acts or other lewd content (e.g., sexually graphic descriptions, \
content aimed at causing arousal). Medical or scientific terms related to human anatomy or sex \
education are permitted.

===

Does the human question violate the above principle? Your answer must start with
'Yes' or 'No'. And then walk through step by step to be sure we answer
correctly.

"""
OF_A_RESPONSE = """\
You are a policy expert trying to help determine
whether an AI response to prompt is in violation of the defined safety policies.

<start_of_turn>
Human Question: Hello
<end_of_turn>

<start_of_turn>
Chatbot Response: Hi!
<end_of_turn>

Our safety principle is defined in the below:

* "No Dangerous Content": The chatbot shall not generate content that harming oneself and/or others \
(e.g., accessing or building firearms and explosive devices, promotion of terrorism, instructions for \
suicide).

===

Does the Chatbot Response violate the above principle? Your answer must start
with 'Yes' or 'No'. And then walk through step by step to be sure  we answer
correctly.

"""
BY_NAME = {policy.name: policy for policy in POLICIES}


def test_a_prompt_is_asked_about_in_shieldgemmas_words():
    assert question(BY_NAME["sexual"], "Hello") == OF_A_PROMPT


def test_a_response_is_asked_about_in_shieldgemmas_words():
    assert question(BY_NAME["dangerous"], "Hello", "Hi!") == OF_A_RESPONSE


def test_there_are_four_policies_in_each_form():
    assert list(BY_NAME) == ["dangerous", "harassment", "hate", "sexual"]
    for policy in POLICIES:
        for response, who in ((None, "The prompt"), ("", "The chatbot")):
            asked = question(policy, "Hello", response)
            assert f'\n* "No {policy.harm}": {who} shall not' in asked
            assert asked.count("<start_of_turn>") == (1 if response is None else 2)
