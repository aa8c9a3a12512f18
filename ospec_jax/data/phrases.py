# SPDX-License-Identifier: Apache-2.0
"""What a target is asked when it writes prompts itself, and tasks on what it wrote.

Asked in many ways, since a draft that learns from the answers must not learn one.
"""

DOCUMENTS = (
    ("Write a detailed article", "#"),
    ("Write a short story", "Once"),
    ("Write a newspaper report", "Last week,"),
    ("Write a passage of an encyclopedia", "The"),
    ("Write a long e-mail to a colleague", "Dear"),
    ("Write a chapter of a textbook", "Chapter 1"),
    ("Write a blog post with several sections", "#"),
    ("Write the minutes of a meeting", "The meeting"),
    ("Write a dialogue between two people", "Anna:"),
    ("Write a product review", "After two weeks"),
    ("Write a biography of an invented person", "Born in"),
    ("Write a speech for a conference", "Ladies and gentlemen,"),
    ("Write a table in Markdown with facts and figures", "|"),
    ("Write a case study with numbers, names and dates", "In 2019,"),
    ("Write a Python program with comments", "```python"),
)
"""Each with how it begins: else small models answer, or talk about themselves."""
SUBJECT = "{form} about this subject: {topic}"
MORE = "Write the next part of the text."
FOREIGN_DOCUMENT = "Write a text of several sentences in {language}"
CHATTER = (
    r"\bI(?:'m| am) (?:here to|happy to|glad|sorry|programmed|designed|an? AI|just an?)"
    r"|\bI(?:'d| would) be (?:happy|glad)"
    r"|\bI can(?:'t|not)? (?:help|assist|provide)"
    r"|\bas an AI\b|\bhow (?:can|may) I (?:help|assist)|\bfeel free to ask\b"
)
"""What an assistant says that talks about itself, and no document does."""

SUMMARIES = (
    "Summarize the following text.",
    "Summarise this in three sentences.",
    "Give me a TL;DR of the text.",
    "Write a one-paragraph summary of this.",
    "List the main points of the text as bullets.",
    "What is this text about? Be brief.",
    "Summarize:",
    "Write a headline and a two-sentence summary.",
    "Shorten this to about 50 words.",
    "Explain this to a ten-year-old in a few sentences.",
)
TRANSLATIONS = (
    "Translate the following text into {language}.",
    "Translate to {language}:",
    "Translate {source} to {language}:",
    "How do you say this in {language}?",
    "Please turn this into {language}.",
    "I need this in {language}.",
)
LANGUAGES = ("German", "French", "Spanish", "Italian", "Portuguese", "Dutch")
EXTRACTIONS = (
    "List all names of people and places in the text.",
    "Extract the key facts as a JSON object.",
    "List every number in the text with what it stands for.",
    "Extract the most important terms, and define each in a sentence.",
    "Make a Markdown table of the facts in this text.",
    "List causes and effects that the text mentions.",
    "Give ten keywords for the text.",
    "Which claims does the text make? List them.",
)
REWRITES = (
    "Rewrite this in a more formal style.",
    "Rewrite the text for children.",
    "Make this more concise without losing facts.",
    "Correct grammar and style of this text.",
    "Rewrite this as a list of steps.",
    "Rewrite this from the point of view of someone who disagrees.",
    "Paraphrase the text.",
    "Turn this into an e-mail to my manager.",
    "Make this text friendlier.",
)
CONTINUATIONS = (
    "Continue this text.",
    "Continue where the text breaks off.",
    "Write the next two paragraphs.",
    "Finish the following text.",
    "How does this go on?",
)
LAYOUTS = (
    "{task}\n\n{text}",
    "{text}\n\n{task}",
    '{task}\n\n"""\n{text}\n"""',
    "Text:\n{text}\n\nTask: {task}",
    "{task}\n\n---\n{text}\n---",
)
ASK_QUESTION = (
    "{text}\n\nWrite one question that the text above answers. Write the question "
    "alone, nothing else."
)
QUESTION_WORDS = ("What", "How", "Why", "Who", "When", "Where", "Which", "Does", "Is")
QUESTION_LAYOUTS = (
    "{text}\n\n{task}",
    "Read the text and answer the question.\n\nText: {text}\n\nQuestion: {task}",
    "Answer with the help of the text.\n\nQuestion: {task}\n\nText: {text}\n\nAnswer:",
    "Context:\n{text}\n\nQuestion: {task}\nAnswer:",
    "{task} Use only what stands here:\n\n{text}",
)

ASK_SYSTEM = (
    "Write instructions, of two to five sentences, for an AI assistant that shall "
    "help people who ask things like this:\n\n{topic}\n\nSay what it knows, and how it "
    'speaks. Begin with "You are".'
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a patient teacher of mathematics. Explain every step.",
    "You are an experienced software engineer. Answer with code and few words.",
    "You are a database expert. Answer with one SQL query and nothing else.",
    "You are a doctor who explains things in plain words, and says when to see one.",
    "You are a lawyer. Name the rules that apply, and say what is uncertain.",
    "You are a translator between English and German.",
    "You are a travel guide who knows the world's cities.",
    "You are a cook. Give recipes with exact amounts.",
    "You are a friendly companion who likes to chat.",
    "You are a copy editor. Improve texts, and say what you changed.",
    "You are a historian. Give dates and sources.",
    "You are a career coach. Ask back where something is unclear.",
    "You are a fitness trainer. Be encouraging and brief.",
    "You are a financial adviser for people without knowledge of the field.",
    "You are a support agent of a company that sells software. Stay polite.",
    "You are a science journalist who writes for a general audience.",
    "You are a poet. Answer in verse.",
    "You are a gardener with forty years of experience.",
    "You are an assistant that answers in JSON with the keys answer and reason.",
    "You are a tutor of English for beginners. Use simple words.",
    "You are a critic of films and books with strong opinions.",
    "You are a physicist. Use formulas where they help.",
    "Answer in at most two sentences.",
    "Think step by step, and give the result in the last line.",
    "Answer as a list of bullet points.",
)

ASK_SIMILAR = (
    "Here is a request:\n\n{topic}\n\nWrite another request of the same kind about "
    "something else. Write the request alone, nothing else."
)
SHOT_LAYOUTS = (
    ("Q: {question}\nA: {answer}\n\n", "Q: {question}\nA:"),
    ("Question: {question}\nAnswer: {answer}\n\n", "Question: {question}\nAnswer:"),
    (
        "### Input\n{question}\n### Output\n{answer}\n\n",
        "### Input\n{question}\n### Output",
    ),
    ("User: {question}\nAssistant: {answer}\n", "User: {question}\nAssistant:"),
    (
        "Problem: {question}\nSolution: {answer}\n---\n",
        "Problem: {question}\nSolution:",
    ),
)
