"""Texts and regular expressions of tokenizers."""

LLAMA_3 = (
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
  ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+'
)
GPT_4O = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
DEEPSEEK = (
  r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?'
  r'[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN_2 = LLAMA_3.replace('{1,3}', '')
WORDS = (
  "the cat's hat, I'll 12 345 6789 \u00e9t\u00e9 \u4e2d\u6587 \U0001f600 x=y;"
  ' ...! e\u0301 \u2581 \u2581a <s> </s> <tool> \x1c \u2003 \u200b naivete'
  ' \u00bd% a\u24b6! [INST] <toolCall>'
).split(' ')
GAPS = [' ', '  ', '   ', '\n', '\n\n', ' \n ', '\t', '\r\n', '', '\u00a0', '\u3000']
