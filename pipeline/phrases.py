"""Phrases that speech models write where nobody says them: closings and credits that their training subtitles end with.

Known from Whisper's output over silence and music in many reports; the lists are short and ours. Credits are caught
wherever they stand; a closing may be said in earnest, so that it is caught only where a text is nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from pipeline.text import split_sentences, tokens

CREDITS: dict[str, tuple[str, ...]] = {
    "Arabic": ("ترجمة نانسي قنقر", "اشتركوا في القناة"),
    "Cantonese": ("字幕由 Amara.org 社群提供", "中文字幕志愿者"),
    "Chinese": (
        "字幕由 Amara.org 社区提供", "字幕由 Amara.org 社群提供", "字幕志愿者", "字幕製作",
        "请不吝点赞 订阅 转发 打赏支持明镜与点点栏目",
        "請不吝點贊訂閱轉發打賞支持明鏡與點點欄目", "优优独播剧场", "中文字幕提供",
    ),
    "Czech": ("Titulky vytvořil JohnyX", "www.hradeckesluzby.cz"),
    "Dutch": ("Ondertiteld door de Amara.org gemeenschap",),
    "English": (
        "subtitles by the amara.org community", "transcription by castingwords",
        "transcribed by otter.ai", "transcript emily beynon", "www.mooji.org",
        "don't forget to like and subscribe", "please like share and subscribe",
        "please subscribe to my channel",
        "please subscribe to our channel", "www.opensubtitles.org",
    ),
    "French": (
        "sous-titres réalisés par la communauté d'amara.org",
        "sous-titres réalisés para la communauté d'amara.org",
        "sous-titrage ST' 501", "sous-titrage société radio-canada", "abonnez-vous à la chaîne",
    ),
    "German": (
        "untertitel der amara.org-community", "untertitel im auftrag des zdf für funk",
        "untertitel von stephanie geiges",
        "untertitelung des zdf", "untertitelung aufgrund der audiodeskription",
    ),
    "Greek": ("υπότιτλοι authorwave",),
    "Hindi": ("चैनल को सब्सक्राइब करें",),
    "Indonesian": ("jangan lupa like share dan subscribe",),
    "Italian": ("sottotitoli creati dalla comunità amara.org", "sottotitoli e revisione a cura di qtss"),
    "Japanese": (
        "チャンネル登録お願いします", "チャンネル登録をお願いします", "チャンネル登録よろしくお願いします",
        "字幕視聴ありがとうございました",
    ),
    "Korean": ("한글자막 by", "구독과 좋아요 부탁드립니다"),
    "Polish": ("napisy stworzone przez społeczność amara.org",),
    "Portuguese": ("legendas pela comunidade amara.org", "inscreva-se no canal", "legenda adriana zanotto"),
    "Romanian": ("nu uitați să dați like",),
    "Russian": (
        "субтитры сделал dimatorzok", "субтитры создавал dimatorzok", "субтитры добавил dimatorzok",
        "подписывайтесь на канал",
    ),
    "Spanish": (
        "subtítulos realizados por la comunidad de amara.org", "subtítulos por la comunidad de amara.org",
        "suscríbete al canal", "suscríbanse al canal",
    ),
    "Swedish": ("undertexter från amara.org", "textning stina hedin", "svensktextning.nu"),
    "Thai": ("อย่าลืมกดติดตาม", "กดไลค์กดแชร์กดติดตาม"),
    "Turkish": ("altyazı m.k.", "abone olmayı unutmayın"),
    "Vietnamese": (
        "hãy subscribe cho kênh", "để không bỏ lỡ những video hấp dẫn", "đừng quên đăng ký kênh",
        "đăng ký kênh để ủng hộ kênh",
    ),
}  # fmt: skip

CLOSINGS: dict[str, tuple[str, ...]] = {
    "Arabic": ("شكرا للمشاهدة", "شكرا لكم على المشاهدة"),
    "Cantonese": ("多謝收睇", "謝謝收看"),
    "Chinese": ("谢谢观看", "謝謝觀看", "感谢观看", "感謝觀看", "谢谢大家观看", "谢谢收看", "下期再见", "我们下期再见"),
    "Czech": ("děkuji za pozornost", "děkujeme za sledování"),
    "Danish": ("tak fordi du så med", "tak for at du så med"),
    "Dutch": ("bedankt voor het kijken", "dank u voor het kijken"),
    "English": (
        "thanks for watching", "thank you for watching", "thank you so much for watching",
        "thank you very much for watching",
        "thanks for listening", "i'll see you in the next video", "see you in the next video",
        "see you next time",
        "like and subscribe", "please subscribe",
    ),
    "Filipino": ("salamat sa panonood", "maraming salamat sa panonood"),
    "Finnish": ("kiitos kun katsoit", "kiitos katsomisesta"),
    "French": ("merci d'avoir regardé cette vidéo", "merci d'avoir regardé", "merci à tous et à bientôt"),
    "German": (
        "vielen dank fürs zuschauen", "danke fürs zuschauen", "vielen dank für ihre aufmerksamkeit",
        "bis zum nächsten mal",
    ),
    "Greek": ("ευχαριστώ που παρακολουθήσατε",),
    "Hindi": ("देखने के लिए धन्यवाद", "वीडियो देखने के लिए धन्यवाद"),
    "Hungarian": ("köszönöm, hogy megnézted a videót", "köszönöm a figyelmet"),
    "Indonesian": ("terima kasih telah menonton", "terima kasih sudah menonton"),
    "Italian": ("grazie per la visione", "grazie per aver guardato il video", "grazie a tutti"),
    "Japanese": (
        "ご視聴ありがとうございました", "ご視聴ありがとうございます",
        "最後までご視聴いただきありがとうございました", "また次の動画でお会いしましょう",
    ),
    "Korean": (
        "시청해주셔서 감사합니다", "시청해 주셔서 감사합니다", "감사합니다 다음 영상에서 만나요",
        "다음 영상에서 만나요",
    ),
    "Macedonian": ("благодарам за гледањето",),
    "Malay": ("terima kasih kerana menonton",),
    "Persian": ("ممنون که تماشا کردید",),
    "Polish": ("dziękuję za oglądanie", "dzięki za oglądanie", "dziękuję za uwagę"),
    "Portuguese": ("obrigado por assistir", "obrigada por assistir", "até o próximo vídeo", "até a próxima"),
    "Romanian": ("vă mulțumesc pentru vizionare", "vă mulțumim pentru vizionare"),
    "Russian": ("спасибо за просмотр", "продолжение следует", "до новых встреч", "благодарю за внимание"),
    "Spanish": ("gracias por ver el video", "gracias por ver el vídeo", "gracias por ver", "hasta la próxima"),
    "Swedish": ("tack för att du tittade", "tack för att ni tittade"),
    "Thai": ("ขอบคุณที่รับชม", "ขอบคุณสำหรับการรับชม"),
    "Turkish": ("izlediğiniz için teşekkür ederim", "izlediğiniz için teşekkürler"),
    "Vietnamese": (
        "cảm ơn các bạn đã theo dõi", "cảm ơn các bạn đã xem video", "cảm ơn đã xem video",
        "hẹn gặp lại các bạn trong những video tiếp theo",
        "xin chào và hẹn gặp lại",
    ),
}  # fmt: skip

OPENINGS: dict[str, tuple[str, ...]] = {
    "Danish": ("danske tekster af", "undertekster af"),
    "Dutch": ("ondertiteling door", "ondertiteld door"),
    "English": ("subtitles by", "subtitled by", "captions by", "captioned by", "transcription by"),
    "French": ("sous-titrage par", "sous-titres par"),
    "German": ("untertitel von", "untertitelung von"),
    "Indonesian": ("subtitle oleh",),
    "Italian": ("sottotitoli a cura di",),
    "Persian": ("زیرنویس توسط",),
    "Polish": ("napisy wykonane przez",),
    "Portuguese": ("legendas por",),
    "Romanian": ("subtitrarea",),
    "Russian": ("редактор субтитров", "субтитры создавал", "субтитры сделал"),
    "Spanish": ("subtítulos por", "subtitulado por"),
    "Swedish": ("undertexter av",),
    "Vietnamese": ("phụ đề bởi", "phụ đề được thực hiện bởi"),
}  # fmt: skip
"""Credits whose name may be anyone's: caught where they begin a sentence."""

Phrases = Mapping[str, Sequence[str]]


def known_phrase(text: str, language: str | None, anywhere: Phrases, whole: Phrases) -> str | None:
    """The credit or closing that `text` holds or is; None without one.

    Those of this module are looked for in every text, `anywhere` and `whole` in texts of their language.
    """
    name = (language or "").partition(",")[0]
    words = _spaced(text)
    for phrase, looked_for in (*_prepared("credits"), *_of_user(tuple(anywhere.get(name, ())))):
        if looked_for in words:
            return phrase
    beginnings = [_spaced(sentence) for sentence in split_sentences(text, name)]
    for phrase, looked_for in _prepared("openings"):
        if any(sentence.startswith(looked_for) for sentence in beginnings):
            return phrase
    closings = (*_prepared("closings"), *_of_user(tuple(whole.get(name, ()))))
    found = sorted((each for each in closings if each[1] in words), key=lambda each: -len(each[1]))
    for _, looked_for in found:
        words = words.replace(looked_for, "")
    return found[0][0] if found and not words else None


@cache
def _prepared(kind: Literal["credits", "openings", "closings"]) -> list[tuple[str, str]]:
    lists = {"credits": CREDITS, "openings": OPENINGS, "closings": CLOSINGS}[kind]
    return [(phrase, _spaced(phrase)) for phrases in lists.values() for phrase in phrases]


@cache
def _of_user(phrases: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(phrase, _spaced(phrase)) for phrase in phrases]


def _spaced(text: str) -> str:
    """Each word between spaces of its own, so that `in` compares whole ones and `replace` takes them out."""
    return "".join(f" {word} " for word in tokens(text))
