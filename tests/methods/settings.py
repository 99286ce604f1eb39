"""The table of methods: the tiny model each one runs on, and the reference it must equal."""

from embedjob.methods.catalogue import read_method
from tests.methods import references as r
from tests.methods.making import Setting

CUT = {"max_tokens": r.MAX_LENGTH}
BGE_TOKENS = ("<instruct>", "<query>", "<response>")
S = tuple(f"<s{n}>" for n in range(1, 17))
EMBEDS = tuple(f"<EMBED{n}>" for n in range(5))
COMPRESSED = '{}: "{{}}". Use one word to represent the {} in a retrieval task. The word is: “'
EXAMPLES = (("what is a fox", "A fox is an animal."), ("and a dog?", "So is a dog."))
SHOWN = [{"text": text, "answer": answer} for text, answer in EXAMPLES]
FEW = {"demonstrations": SHOWN}
ECHO_QUERY = "<s>Instruct:{!%%prompt%%,}\nQuery:{!%%text%%}\nQuery again:{%%text%%}{</s>}"
ECHO_DOCUMENT = "<s>Document:{!%%text%%}\nDocument again:{%%text%%}{</s>}"
SUMMARY = '", summarize the above passage within eight words: ' + "".join(S[:8])
PREDICTION = '", predict the following passage within eight words: ' + "".join(S[8:])
TAILS = (
    "can be described in one word",
    "has as its topic, in one word",
    "has the title",
)
FIRST = [f'This sentence : "*sent_0*" {tail}:"' for tail in TAILS]
ICL = f'This sentence : "A jockey riding a horse." means in one word:"Equestrian".{r.EOL}'


def of_eos(family: str, prefix: str = "", *, most: int = r.MAX_LENGTH) -> r.Reference:
    return r.last_of_eos(prefix, eos="</s>" if family != "qwen" else "<|endoftext|>", most=most)


MERGED = {"adapters": []}  # Their weights are random: tests/encoder/test_adapters.py merges some.
SHORTER = {"max_tokens": r.MAX_LENGTH - 1}
HEADER_END = "<|end_header_id|>"
CHAT_3 = (read_method("llm2vec").for_models or {})["Llama-3-8B-Instruct"]
LLAMA_3 = {**MERGED, **CHAT_3.encoder}
ASKED_LLAMA_3 = {**LLAMA_3, **(CHAT_3.roles or {})["query"]}
# A tiny model has three blocks.
PREPENDED = {"interventions": [{"prepend": {"slot": "<PST>", "start": 0, "exit": 2}}], "layer": -1}
PREPENDING = read_method("token_prepending")
FOR_SMOLLM2 = (PREPENDING.for_models or {})["SmolLM2-135M"].encoder
LIKE = FOR_SMOLLM2["interventions"][0]["prepend"]
PREPENDED_LIKE = {
    "interventions": [{"prepend": {**LIKE, "start": 1, "exit": 3}}],
    "layer": FOR_SMOLLM2["layer"],
}
PUBLISHED = PREPENDING.encoder["interventions"][0]["prepend"]
PREPENDED_AS_PUBLISHED = {"interventions": [{"prepend": {**PUBLISHED, "exit": 2}}]}
# The authors' prompt, from the file; a tiny model has three blocks.
AGAINST = read_method("contrastive_prompting").encoder["interventions"][0]["contrast"]
CONTRASTED = {"interventions": [{"contrast": {**AGAINST, "layer": 1}}]}
NORM = {"template": AGAINST["template"], "layer": 0, "mode": "norm"}
AT_NORM = {"interventions": [{"contrast": NORM}], "layer": -1}
BOTH_WAYS = {**CUT, "attention": "bidirectional"}
UNFITTED = {**CUT, "finish": [{"normalize": True}]}
LONG = {"max_tokens": 512}
QUESTION = "Given a question, retrieve passages that answer the question"
QWEN = {**CUT, "special_tokens": {"eos_id": 420}}
ROOMY = {"max_tokens": 240}
ROOMY_QWEN = {**QWEN, **ROOMY}
MOST = {"most": ROOMY["max_tokens"]}
UNIT = {**BOTH_WAYS, "finish": [{"normalize": True}]}

# The authors' files for Llama-3: each backslash-n is two characters.
REPS_PREFIX = (
    r"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an AI assistant that"
    r" can understand human language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
REPS_ANSWER = r"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nThe "
REPS_SUFFIX = (
    '". Use one word to represent the %s in a retrieval task. Make sure your word is in lowercase.'
    f'{REPS_ANSWER}word is: "'
)
REPS_MULTI_SUFFIX = (
    '". Use three words to represent the %s in a retrieval task. Make sure your words are in'
    f' lowercase and split them by space.{REPS_ANSWER}words are: "'
)
REPS_TOKENS = ("<|end_header_id|>",)
SHORTLY = {"decode": {"max_tokens": 4, "until": "e"}}

# Ids in place of what a fit samples; tests/stages compares the sampling. They differ in length.
ANCHORS = ((17, 300, 5), (99,), (7, 7, 600, 41, 2))
ANCHORED = {**ROOMY, "heads": [{"anchors": [list(ids) for ids in ANCHORS]}]}

CASES: list[tuple[Setting, r.Reference]] = [
    (Setting("bert_cls", "document", "bert", "bert", knobs=CUT), r.bert(cls=True)),
    (Setting("bert_mean", "document", "bert", "bert", knobs=CUT), r.bert()),
    (
        Setting("mean", "document", "bert", "bert", knobs=BOTH_WAYS),
        r.bert(),
    ),
    (Setting("bert_first_last", "document", "bert", "bert", knobs=CUT), r.bert(first_last=True)),
    *(
        # What comes before the fit; its own arithmetic is compared in tests/vectors.
        (Setting(name, "document", "bert", "bert", knobs=UNFITTED), r.bert(first_last=True))
        for name in ("bert_whitening", "bert_flow")
    ),
    (Setting("sbert", "document", "bert", "bert", knobs=CUT), r.bert()),
    (Setting("simcse_unsup", "document", "bert", "bert", knobs=CUT), r.bert(cls=True)),
    (Setting("simcse_sup", "document", "bert", "bert", knobs=CUT), r.simcse_sup),
    (
        Setting("instructor", "document", "t5", "t5", knobs=CUT),
        r.instructor("Represent the document for retrieval:"),
    ),
    (
        Setting("instructor", "query", "t5", "t5", knobs={**CUT, "instruction": " Find: "}),
        r.instructor(" Find: "),
    ),
    (
        Setting("instructor", "symmetric", "t5", "t5", knobs=CUT),
        r.instructor("Represent the sentence:"),
    ),
    (Setting("e5", "query", "bert", "bert", knobs=CUT), r.bert("query: ")),
    (Setting("e5", "document", "bert", "bert", knobs=CUT), r.bert("passage: ")),
    (Setting("e5", "symmetric", "bert", "bert", knobs=CUT), r.bert("query: ")),
    (Setting("gte", "document", "bert", "bert", knobs=CUT), r.bert()),
    (Setting("bge", "document", "bert", "bert", knobs=CUT), r.bert(cls=True)),
    (
        Setting("bge", "query", "bert", "bert", knobs=CUT),
        r.bert("Represent this sentence for searching relevant passages: ", cls=True),
    ),
    (Setting("e5_instruct", "document", "xlmr", "xlmr", knobs=CUT), r.bert()),
    (
        Setting("e5_instruct", "query", "xlmr", "xlmr", knobs={**CUT, "instruction": "Find it"}),
        r.bert("Instruct: Find it\nQuery: "),
    ),
    (Setting("e5_mistral", "document", "mistral", "mistral", knobs=CUT), of_eos("mistral")),
    (
        Setting("e5_mistral", "query", "mistral", "llama", knobs={**CUT, "instruction": "Find"}),
        of_eos("llama", "Instruct: Find\nQuery: "),
    ),
    (Setting("qwen3_embedding", "document", "qwen3", "qwen", knobs=QWEN), of_eos("qwen")),
    (
        Setting("qwen3_embedding", "query", "qwen3", "qwen", knobs={**QWEN, "instruction": "F"}),
        of_eos("qwen", "Instruct: F\nQuery:"),
    ),
    (Setting("bge_en_icl", "document", "mistral", "llama", BGE_TOKENS, True), r.bare_with_eos),
    (
        Setting("bge_en_icl", "query", "mistral", "llama", BGE_TOKENS, True),
        r.bge_en_icl(r.ICL_SEARCH, ()),
    ),
    (Setting("llara", "document", "llama", "llama", S), r.llara(SUMMARY)),
    (Setting("llara", "symmetric", "llama", "llama", S), r.llara(SUMMARY)),
    (Setting("llara", "query", "llama", "llama", S), r.llara(PREDICTION)),
    (
        Setting("repllama", "document", "llama", "llama", knobs={**MERGED, **SHORTER}),
        r.repllama("passage: "),
    ),
    (
        Setting("repllama", "query", "llama", "mistral", knobs={**MERGED, **SHORTER}),
        r.repllama("query: "),
    ),
    (
        Setting("llm2vec", "document", "mistral", "mistral", knobs=MERGED),
        r.llm2vec("", "[INST] ", " [/INST]"),
    ),
    (
        Setting("llm2vec", "query", "mistral", "llama", knobs=MERGED),
        r.llm2vec(f"{r.SEARCH}:", "[INST] ", " [/INST]"),
    ),
    (
        Setting("llm2vec", "symmetric", "llama", "llama", knobs=MERGED),
        r.llm2vec("Retrieve semantically similar text:", "[INST] ", " [/INST]"),
    ),
    (
        Setting("llm2vec", "document", "llama", "llama3", (HEADER_END,), knobs=LLAMA_3),
        r.llm2vec("", f"<|start_header_id|>user{HEADER_END}\n\n", "<|eot_id|>"),
    ),
    (
        Setting("llm2vec", "query", "llama", "llama3", (HEADER_END,), knobs=ASKED_LLAMA_3),
        r.llm2vec(f"{r.SEARCH}:", f"<|start_header_id|>user{HEADER_END}\n\n", "<|eot_id|>"),
    ),
    (Setting("gritlm", "document", "mistral", "mistral"), r.gritlm("")),
    (Setting("gritlm", "query", "mistral", "mistral"), r.gritlm(r.SEARCH)),
    (Setting("gritlm", "symmetric", "mistral", "llama"), r.gritlm(r.STS)),
    (Setting("nv_embed", "document", "nvembed", "mistral", knobs=LONG), r.nv_embed("")),
    (Setting("nv_embed", "query", "nvembed", "mistral", knobs=LONG), r.nv_embed(QUESTION)),
    (Setting("nv_embed", "symmetric", "nvembed", "llama", knobs=LONG), r.nv_embed(r.BARE_STS)),
    (Setting("echo_finetuned", "document", "mistral", "mistral"), r.echo(ECHO_DOCUMENT)),
    (Setting("echo_finetuned", "query", "mistral", "mistral"), r.echo(ECHO_QUERY, r.SEARCH)),
    (Setting("echo_finetuned", "symmetric", "mistral", "llama"), r.echo(ECHO_QUERY, r.STS)),
    (
        Setting("echo", "document", "llama", "llama"),
        r.echo("Query:{!%%text%%}\nQuery again:{%%text%%}", bos=True),
    ),
    (
        Setting("echo_rewrite", "document", "qwen3", "qwen"),
        r.echo("Rewrite the following paragraph: {!%%text%%}\nThe rewritten paragraph: {%%text%%}"),
    ),
    (
        Setting("autoregembed", "document", "llama", "llama", EMBEDS),
        r.autoregembed(COMPRESSED.format("Passage", "passage")),
    ),
    (
        Setting("autoregembed", "query", "llama", "llama", EMBEDS),
        r.autoregembed(COMPRESSED.format("Query", "query")),
    ),
    (
        Setting("autoregembed", "symmetric", "llama", "llama", EMBEDS),
        r.autoregembed("{}\nThis sentence means in one word: “"),
    ),
    (Setting("prompteol", "document", "opt", "opt"), r.eol(r.EOL)),
    (Setting("prompteol", "document", "llama", "llama3"), r.eol(r.EOL)),
    (Setting("prompteol_icl", "document", "opt", "gpt2"), r.eol(ICL)),
    (Setting("pretended_cot", "document", "llama", "llama"), r.eol(r.COT, layer=-2)),
    (Setting("knowledge_enhanced", "document", "qwen3", "qwen"), r.eol(r.KE, layer=-2)),
    (Setting("cot_ke_mean", "document", "llama", "llama"), r.eol(r.COT, r.KE, layer=-2)),
    (Setting("metaeol", "document", "mistral", "mistral"), r.eol(*r.META)),
    (Setting("geneol", "document", "llama", "llama3"), r.geneol),
    (Setting("geneol", "document", "mistral", "llama"), r.geneol),
    (
        Setting("token_prepending", "document", "llama", "llama3", knobs=PREPENDED_LIKE),
        r.token_prepending(1, 3, row="!", layer=-1),
    ),
    (
        Setting("token_prepending", "document", "mistral", "mistral", knobs=PREPENDED),
        r.token_prepending(0, 2, row=0, layer=-1),
    ),
    (
        Setting("token_prepending", "document", "llama", "llama", knobs=PREPENDED),
        r.token_prepending(0, 2, row=0, layer=-1),
    ),
    (
        Setting("token_prepending", "document", "llama", "gpt2", knobs=PREPENDED_AS_PUBLISHED),
        r.token_prepending(1, 2, row=3407, layer=-2),
    ),
    (
        Setting("contrastive_prompting", "document", "mistral", "mistral", knobs=AT_NORM),
        r.contrastive(0, None, layer=-1),
    ),
    (
        Setting("contrastive_prompting", "document", "qwen3", "qwen", knobs=CONTRASTED),
        r.contrastive(1, 0.5, layer=-2),
    ),
    (Setting("text_first_views", "document", "llama", "llama3"), r.eol(*FIRST, layer=-2)),
    (
        Setting("promptreps", "document", "llama_lm", "llama3", REPS_TOKENS),
        r.promptreps(REPS_PREFIX + 'Passage: "', REPS_SUFFIX % "passage"),
    ),
    (
        Setting("promptreps_multi", "document", "llama_lm", "llama3", REPS_TOKENS, knobs=SHORTLY),
        r.promptreps(REPS_PREFIX + 'Passage: "', REPS_MULTI_SUFFIX % "passage", words=4, until="e"),
    ),
    (
        Setting("trajectories", "document", "llama_lm", "llama", knobs=ANCHORED),
        r.trajectories(*ANCHORS),
    ),
    (Setting("moee", "document", "olmoe", "gpt2"), r.moee),
    (Setting("moee", "document", "qwen_moe", "qwen"), r.moee),
    (Setting("splade", "document", "bert_lm", "bert", knobs=UNIT), r.splade),
]
# Methods whose span is the text's own tokens and nothing else: an empty text has none.
OF_THE_TEXT_ALONE = frozenset({"gritlm", "echo", "echo_rewrite"})
# Methods that look words up: they run no tiny model, and tests/static holds them to
# sentence-transformers and scikit-learn.
TABLES = frozenset({"bow", "glove", "sif", "tfidf", "word2vec"})
# Of a method whose invariants are held above in another role.
OTHER_ROLES: list[tuple[Setting, r.Reference]] = [
    (
        Setting("promptreps", "query", "llama_lm", "llama3", REPS_TOKENS),
        r.promptreps(REPS_PREFIX + 'Query: "', REPS_SUFFIX % "query"),
    ),
    (
        Setting("promptreps_multi", "query", "llama_lm", "llama3", REPS_TOKENS, knobs=SHORTLY),
        r.promptreps(REPS_PREFIX + 'Query: "', REPS_MULTI_SUFFIX % "query", words=4, until="e"),
    ),
    (
        Setting("e5_instruct", "query", "xlmr", "xlmr", knobs=ROOMY),
        r.bert(f"Instruct: {r.SEARCH}\nQuery: ", **MOST),
    ),
    (
        Setting("e5_instruct", "symmetric", "xlmr", "xlmr", knobs=ROOMY),
        r.bert(f"Instruct: {r.STS}\nQuery: ", **MOST),
    ),
    (
        Setting("e5_mistral", "query", "mistral", "mistral", knobs=ROOMY),
        of_eos("mistral", f"Instruct: {r.SEARCH}\nQuery: ", **MOST),
    ),
    (
        Setting("e5_mistral", "symmetric", "mistral", "mistral", knobs=ROOMY),
        of_eos("mistral", f"Instruct: {r.STS}\nQuery: ", **MOST),
    ),
    (
        Setting("qwen3_embedding", "query", "qwen3", "qwen", knobs=ROOMY_QWEN),
        of_eos("qwen", f"Instruct: {r.SEARCH}\nQuery:", **MOST),
    ),
    (
        Setting("qwen3_embedding", "symmetric", "qwen3", "qwen", knobs=ROOMY_QWEN),
        of_eos("qwen", f"Instruct: {r.BARE_STS}\nQuery:", **MOST),
    ),
    (
        Setting("bge_en_icl", "symmetric", "mistral", "llama", BGE_TOKENS, True),
        r.bge_en_icl(r.STS, ()),
    ),
    (
        Setting("bge_en_icl", "query", "mistral", "llama", BGE_TOKENS, True, FEW),
        r.bge_en_icl(r.ICL_SEARCH, EXAMPLES),
    ),
    (
        Setting("echo_finetuned", "query", "mistral", "mistral", knobs={"instruction": ""}),
        r.echo(ECHO_QUERY),
    ),
    (
        Setting("llm2vec", "symmetric", "llama", "llama3", knobs={**MERGED, "instruction": ""}),
        r.llm2vec("", "[INST] ", " [/INST]"),
    ),
    (
        Setting("llm2vec", "query", "mistral", "llama", knobs={**MERGED, "instruction": ""}),
        r.llm2vec("", "[INST] ", " [/INST]"),
    ),
    (
        Setting("llm2vec", "query", "mistral", "llama", knobs={**MERGED, "instruction": " Find: "}),
        r.llm2vec(" Find: ", "[INST] ", " [/INST]"),
    ),
]
