# ruff: noqa: E501
"""Texts that tokenizers split differently: WORDS written by hand, STRINGS with mixtures of them."""

# Combining marks inside words.
MARKS = [
    "हिन्दी पाठ", "বাংলা", "ខ្មែរ", "🏳️‍🌈", "e\u0301te\u0301", "n\u0303 A\u030a", "क्षत्रिय संस्कृतम्", "নমস্কার", "தமிழ் மொழி", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "සිංහල", "ကျေးဇူးတင်ပါတယ်", "བོད་སྐད", "ภาษาไทยไม่มีช่องว่าง", "مُحَمَّد قَالَ", "שָׁלוֹם", " \u0301after space", "a\u0308\u0301b", "Z̷a̴l̸g̵o̶", "☺️☺", "\u212b \u212a \u2126 A\u030a", "x̄ ± σ²",
]  # fmt: skip
# A change of case beyond ASCII.
CASE = [
    "ŒUVRE", "ПриветМир", "приветМИР мИр", "éÉtéÉTÉ", "iPhoneÉcole",
]  # fmt: skip
# The long s, which equals s where case is ignored.
LONG_S = [
    "'ſ the'ſame",
]  # fmt: skip
# White space beyond ASCII, between U+0800 and U+4E00.
WIDE = [
    "\u3000wide\u3000space", "thin\u2009space", "\u2028line sep", "a\u205fb\u202fc\u1680d", "   \u3000  x",
]  # fmt: skip
WORDS = [
    *MARKS, *CASE, *LONG_S, *WIDE,
    "Hello, world!", "hello  world", " leading", "trailing ", "   three", "tab\tseparated\t\tvalues", "line\nbreak",
    "two\n\nbreaks", "\n", "\n\n\n", " \n ", "\r\n", "a\r\nb", "  \n  \n  x", " ", "  ", "     ", "\t", "x\t y",
    "I'm you're he'll we've it's don't she'd", "I'M YOU'RE HE'LL WE'VE IT'S DON'T SHE'D", "'s't're", "''", "O'Neil's",
    "0", "12", "123", "1234", "12345", "123456789", "3.14159", "-1e-10", "1,234,567.89", "2026-11-23", "12:30:59.001",
    "x1y22z333w4444", "１２３", "٣٤٥", "½ ¾", "²³", "Ⅷ", "100%", "$9.99", "€5", "#1", "A1B2C3", "1st 2nd 3rd",
    "naïve café résumé", "Ünïcödé", "ÀÉÎÕÜ", "straße", "Ελληνικά κείμενο", "Русский текст", "УКРАЇНСЬКА мова",
    "עברית", "العربية نص", "ไทย ภาษา", "ქართული", "Հայերեն", "中文文本", "日本語テキスト", "ひらがな カタカナ",
    "한국어 텍스트", "繁體中文，標點。", "Tiếng Việt", "Türkçe ışık İstanbul", "ελλ123абв", "中1文2", "mixed中文and English",
    "😀", "😀😀", "👩‍👩‍👧‍👦", "👍🏽", "🇫🇷🇩🇪", "text😀text", " 😀 ", "😶‍🌫️ cloud", "❤️", "✅ done", "→ ← ⇒", "…", "“quotes” ‘single’",
    "«guillemets»", "—em—dash–en", "•bullet", "©®™", "∑∫√∞≠≤≥", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ﬁ ligature", "Ａｂｃ", "\u00a0nbsp\u00a0", 
    "zero\u200bwidth", "soft\u00adhyphen", "\ufeffbom", "a\u0085b", "\x07bell", "\x1b[31mred",
    "!!!", "???", "...", "---", "===", "***", "___", "///", "\\\\\\", "```", "~~~", "()[]{}<>", "a.b.c", "a,b,c", "a;b;c",
    "a/b/c", "a\\b\\c", "a_b_c", "a-b-c", "a+b=c", "a|b", "a&b", "a@b.com", "http://example.org/path?q=1&r=2#frag",
    "C:\\Users\\me\\file.txt", "/usr/local/bin", "user@host:~$ ls -la", "!@#$%^&*()", "\"double\" 'single'", "it's \"so\"",
    "def f(x):\n    return x**2\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}", "if (a && b || !c) { }",
    "SELECT * FROM t WHERE a='b';", "<html><body class=\"x\">&nbsp;</body></html>", "{\"key\": [1, 2.5, null, true]}",
    "# Heading\n\n- item 1\n- item 2\n", "| a | b |\n|---|---|\n| 1 | 2 |", "$x^2 + y^2 = z^2$", "\\frac{a}{b}",
    "import numpy as np  # comment", "lambda x: x[::-1]", "std::vector<int> v{1,2,3};", "fn main() -> Result<(), Error> {",
    "0xDEADBEEF", "0b1010", "1_000_000", "camelCase PascalCase snake_case SCREAMING_CASE kebab-case", "XMLHttpRequest",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababab", "AAAAaaaaAAAA", "the the the the", "a b c d e f g h",
    "supercalifragilisticexpialidocious", "antidisestablishmentarianism", "ﷺ", "a" * 300, " " * 40 + "x", "\n" * 20 + "x",
    "x" + "\t" * 9, "word " * 30, "1" * 50, "." * 70, "ab" * 100, "é" * 30, "中" * 30, "😀" * 10,
    # special and added tokens inside text
    "a[user word]b", "<|begin|>x", "[user word] [user word]", "x <|end|>", "<|end|>\n\n<|begin|>", "[user", "<|beg",
    "  <|begin|>  y  ", "<tool>{}</tool>", "if<tool>:", "é<|end|>é", "<|end|><|end|>",
    # combining marks, joiners, scripts that need them
    
    "ລາວ", "نیم‌فاصله", "\u0301alone", 
    "ঁx", "᠎mongolian", "ⴰⵣⵓⵍ", "ꦗꦮ", "አማርኛ",
    # case beyond ASCII
    "ΑΒΓαβγ", "straßeSTRASSE", "ǅ Ǆ ǆ", "ÄÖÜäöüSS", "IJsselmeer Ĳ", "ＡＢａｂ", "ʻokina ʰx",
    # apostrophes
    "don’t", "DON'T don'T Don't", "l'été d'Été", "'tis 'Twas", "o'clock's", "x''s", "rock'n'roll", "we'veX i'llY", "'''", "it's5 5's",
    # invisible and control characters
    "a\u200bb", "a\u200db", "a\u200cb", "\u200fabc\u200e", "\u202eabc\u202c", "a\u2060b", "\x00", "\x01\x02\x03", "a\x0bb\x0cc", "\x1c\x1d\x1e\x1f",
    "\x7f", "\x80\x9f", "\u180eb", "\ufffd", "\ufffe\uffff", "\ue000\uf8ff", "\U0010ffff", "\U000e0041", "\u2028\u2029",
    # lines and spaces
    "\n\r", "\r\r\n\n", "a \r\n b", "\t\n\t", " \t \n \t ", "a\n \n  \n   b", "x \n", "x\t\n\n\ty", "...\n\n\n", "!\r\n\r\n?", "/\n/\n", "a/\n\n//\r\n/b", 
    "\u00a0\u00a0x", " \u00a0 \u00a0", "a" + " " * 7 + "b" + " " * 8 + "\n" + " " * 9, "\n" * 40, " " * 70, "\t" * 33,
    # numbers
    "0123456789" * 3, "1 2 3", "1,2;3", "१२३४५६", "๑๒๓", "一二三四", "①②③④", "¼½¾", "1e5 1E-5 0.5e+10", "v1.2.3-rc4", "12ab34cd56", "٠١٢٣٤٥٦٧٨٩", "𝟏𝟐𝟑", "10²³", "ⅣⅨ", "1_000", "#123456",
    # symbols, widths, emoji
    "▁ lower▁block ▁▁", "░▒▓█", "┌─┐│└─┘", "♠♥♦♣", "①a", "㍿㎏", "ﾊﾟｶﾅ", "👨‍💻👩🏿‍🚀", "🇺🇳🏴\U000e0067\U000e0062\U000e007f", "1️⃣2️⃣", "a👍b👍🏽c", "🫠🪿", 
    "ﷲ", "𠮷野家", "㐀䶿", "가각 ㄱㅏ", "\u1100\u1161\u11a8", "。！？、", "「」『』", "ーー〜〜", "ﬀﬁﬂ", "₿ ₹ ₩", "a→b⇒c", "...!?...", "--- ---", "/* */ // /**/", "~/.bashrc && ./a.out || true",
    "https://ja.wikipedia.org/wiki/日本?q=%E3%81%82#sec-1", "me+tag@mail.example.co.uk", "s3://b/k?v=1&w=2", "\\u00e9\\n\\t", "&amp;&#x27;", "a\\\\b", "print(f\"{x!r:>{w}}\")", "#!/bin/sh\nset -eu\n", "x = {\n\t'k': [1,\n\t\t2],\n}",
]  # fmt: skip
_PIECES = ["The answer", " is", "  42", "\n", "\t", "it's", " naïve", "中文", "😀", "1234", "...", " \n ", "x=y;", "ω"]
STRINGS = WORDS + [
    "".join(_PIECES[(i * step + i * i + step // 7) % len(_PIECES)] for i in range(2 + step % 7))
    for step in range(1, 101)
]
