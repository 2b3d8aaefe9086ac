"""Random everyday sentences in English, Vietnamese and Mandarin Chinese.

The tiny checkpoints are trained on speech that espeak-ng synthesizes, so their texts have to come from somewhere that
is free of licenses, endless, and reproducible from a seed. A grammar gives all three. Its word lists are wide and drawn
from almost uniformly: the next word is hard to guess, and a model that transcribes well must have listened. Words
that sound alike are kept out of the same slot, so that the speech determines the writing.

A grammar is a table of slots. `{slot}` is replaced by a random entry of that slot, itself expanded; `{verb:1}` takes
the second of the forms an entry lists between slashes; `{#2-99}` is a spelled number from that range. In word lists,
`_` stands for a space inside an entry.

espeak-ng voices: `en-us` and `vi`; for Chinese `cmn-latn-pinyin`, because `cmn` reads most characters as English.
"""

import random
import re
from collections.abc import Callable

LANGUAGES = ("English", "Vietnamese", "Chinese")

_SLOT = re.compile(r"\{(?:(\w+)(?::(\d))?|#(\d+)-(\d+))\}")


def _words(text: str) -> list[str]:
    return [word.replace("_", " ") for word in text.split()]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


# ---------------------------------------------------------------------------------------------------------- English

_EN: dict[str, list[str]] = {
    "name": _words(
        """Anna David Emma Oliver Daniel Peter Michael Robert William Henry George Richard Edward Arthur Oscar Victor
        Simon Martin Alice Laura Julia Linda Helen Nancy Susan Emily Charlotte Barbara Patricia Diana Monica"""
    ),
    "city": _words(
        """London Paris Berlin Boston Chicago Dallas Denver Houston Madrid Lisbon Vienna Prague Dublin Moscow Tokyo
        Sydney Toronto Seattle Miami Athens Cairo Helsinki Warsaw Mexico Canada"""
    ),
    "job": _words(
        "teacher doctor nurse farmer driver student manager engineer lawyer singer waiter baker officer captain"
    ),
    "kin": _words("mother father sister brother uncle cousin neighbor friend daughter grandmother husband wife"),
    "place": _words(
        """market station school hospital library airport bank bridge museum office church factory restaurant hotel
        harbor theater park stadium castle bakery"""
    ),
    "thing": _words(
        """table chair lamp mirror bottle ticket camera umbrella blanket bicycle jacket basket letter suitcase hammer
        ladder computer telephone guitar notebook pencil hat shirt coat box picture radio watch knife spoon clock
        candle pillow newspaper envelope"""
    ),
    "animal": _words("dog cat horse rabbit monkey elephant tiger lion donkey goat duck pigeon mouse snake turtle fox"),
    "mass": _words("bread cheese rice soup coffee tea milk butter sugar salt honey chicken fish salad chocolate juice"),
    "plural": _words("apples bananas tomatoes potatoes onions carrots eggs lemons cookies mushrooms grapes cherries"),
    "food": ["{mass}", "{mass}", "{plural}"],
    "meal": _words("breakfast lunch dinner work class"),
    "adj": _words(
        """old new big small heavy broken beautiful cheap expensive clean dirty wooden empty strange ordinary lovely
        useful plastic round golden soft {color} {color} {color}"""
    ),
    "color": _words("red blue green yellow black white brown purple"),
    "feel": _words(
        """happy tired angry hungry busy sick nervous proud lonely famous young quiet polite clever careful brave
        honest friendly late"""
    ),
    "weather": _words("cold warm windy cloudy sunny dry foggy terrible"),
    "weekday": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": _words("January February March April May June July August September October November December"),
    "past": _words(
        "yesterday last_week last_month last_night this_morning last_{weekday} on_{weekday} in_{month} {#2-20}_days_ago"
    ),
    "future": _words("tomorrow next_week next_month tonight soon next_{weekday} on_{weekday} in_{month}"),
    "daypart": _words("morning afternoon evening"),
    "freq": _words("always usually often sometimes never rarely"),
    "manner": _words("quickly slowly carefully quietly loudly gently badly together alone again politely"),
    "luck": _words("fortunately unfortunately finally suddenly actually eventually apparently"),
    "clock": ["half past {#1-12}", "a quarter past {#1-12}", "{#1-12} {#11-59}", "{#1-12} {#11-59}"],
    "vehicle": _words("train bus ferry taxi truck"),
    "do": _words(
        """buy/bought sell/sold find/found lose/lost bring/brought take/took keep/kept hide/hid carry/carried
        drop/dropped borrow/borrowed repair/repaired break/broke show/showed move/moved forget/forgot check/checked
        choose/chose wash/washed paint/painted"""
    ),
    "act": _words(
        """sleep/slept laugh/laughed dance/danced sing/sang swim/swam work/worked study/studied wait/waited run/ran
        walk/walked cry/cried smile/smiled rest/rested shout/shouted play/played"""
    ),
    "roam": _words("slept waited ran walked rested played jumped drank"),
    "cook": _words("cooks/cooked orders/ordered shares/shared prepares/prepared mixes/mixed serves/served"),
    "go": _words("travel/traveled drive/drove return/returned move/moved"),
    "meet": _words("met visited called helped thanked"),
    "person": _words("{name} {name} the_{job} my_{kin}"),
    "one": _words("{person} {person} {person} {person} he she"),
    "who": _words("{person} {person} {person} {person} he she we they"),
    "adjthing": ["{thing}", "{adj} {thing}", "{adj} {thing}"],
    "sentence": _lines(
        """
        {who} {do:1} a {adjthing} {past}.
        {past}, {who} {do:1} a {adjthing} at the {place}.
        did {who} {do:0} the {adjthing} {past}?
        {who} {go:1} to {city} with {person} {past}.
        where did {who} {do:0} the {adjthing}?
        when will {who} {go:0} to {city} with the {adj} {thing}?
        {one} {freq} {cook:0} {food} with {food} in the {daypart}.
        this {adj} {thing} costs {#2-9999} dollars.
        the {vehicle} to {city} leaves at {clock} in the {daypart}.
        how many {plural} did {who} {do:0} {past}?
        {who} {cook:1} {#2-99} {plural} and {#2-99} {plural} at the {place}.
        for {meal}, we need {food}, {food} and {mass}.
        when the weather is {weather}, we {freq} {act:0} at the {place}.
        if it rains {future}, {who} will {act:0} at the {place}.
        because {one} was {feel}, {who} {act:1} {manner} at the {place}.
        {person} is {feel}, but {person} is {feel} and {feel}.
        is {one} still {feel} after {meal} with {person}?
        {name}, please {do:0} the {adjthing} near the {place}!
        what a {adj} {thing} {who} {do:1}!
        the {color} {animal} {roam} {manner} near the {place}.
        have you or {person} ever seen a {color} {animal} in {city}?
        can you tell {person} where the {adj} {thing} is?
        the radio says that it will be {weather} and {weather} in {city} {future}.
        hello, my name is {name} and my {adj} {thing} does not work.
        {person} has lived in {city} for {#2-90} years.
        why does {one} {freq} {do:0} the {adjthing}?
        {luck}, {who} {meet} {person} at the {place} {past}.
        {who} could not {do:0} the {thing}, so {who} {act:1} {manner}.
        do you want the {color} {thing} or the {color} {thing}?
        the {animal} and the {adj} {animal} {roam} {manner} {past}.
        """
    ),
}

_EN_SMALL = _words(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen"""
)
_EN_TENS = _words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def _english_number(n: int) -> str:
    if n < 20:
        return _EN_SMALL[n]
    if n < 100:
        return _EN_TENS[n // 10] + (f" {_EN_SMALL[n % 10]}" if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head, rest = f"{_english_number(n // unit)} {name}", n % unit
    if not rest:
        return head
    return f"{head} {'and ' if rest < 100 else ''}{_english_number(rest)}"


# ------------------------------------------------------------------------------------------------------- Vietnamese

_VI: dict[str, list[str]] = {
    "name": _words(
        """An Bình Cường Dũng Đạt Đức Hà Hải Hạnh Hiếu Hoa Hùng Hương Khánh Lan Linh Long Mai Minh Nam Nga Ngọc Nhung
        Phong Phúc Phương Quân Sơn Tâm Thảo Thu Tuấn Tùng Vân Việt Yến"""
    ),
    "city": _words(
        """Hà_Nội Hải_Phòng Đà_Nẵng Huế Vinh Nam_Định Thái_Bình Cần_Thơ Nha_Trang Đà_Lạt Vũng_Tàu Sài_Gòn Lào_Cai
        Hạ_Long Bắc_Ninh Quảng_Ninh Nghệ_An Hội_An Tây_Ninh Cà_Mau Bến_Tre Phú_Quốc Điện_Biên Hà_Giang Ninh_Bình
        Lạng_Sơn"""
    ),
    "title": _words("anh chị cô chú bác ông bà"),
    "kin": _words("mẹ bố em_gái anh_trai chị_gái bà_ngoại ông_nội bạn vợ chồng con_gái cháu thầy"),
    "job": _words(
        """bác_sĩ cô_giáo công_nhân nông_dân học_sinh kỹ_sư luật_sư ca_sĩ nhà_báo y_tá đầu_bếp giám_đốc thợ_mộc
        cảnh_sát họa_sĩ"""
    ),
    "place": _words(
        """chợ trường_học bệnh_viện thư_viện nhà_ga sân_bay công_viên ngân_hàng bưu_điện nhà_hàng khách_sạn siêu_thị
        nhà_máy bảo_tàng hiệu_sách cửa_hàng bến_xe nhà_thờ văn_phòng quán_cà_phê phòng_khám bãi_biển vườn_hoa bờ_hồ
        cánh_đồng ngã_tư"""
    ),
    "thing": _words(
        """cái_bàn cái_ghế chiếc_xe_đạp quyển_sách tờ_báo con_dao bức_tranh cái_mũ chiếc_áo cái_đèn chiếc_đồng_hồ
        cái_gương cái_bát đôi_đũa bức_thư cây_bút cái_ví chiếc_túi cái_chìa_khóa chiếc_máy_tính chiếc_điện_thoại
        cái_gối tấm_chăn tấm_ảnh cái_thang cây_đàn cái_chổi cái_nồi cái_chảo con_búp_bê quả_bóng hộp_bánh cái_khăn
        chiếc_nhẫn tấm_vé cái_tủ chiếc_thuyền lá_cờ chiếc_quạt đôi_tất"""
    ),
    "animal": _words("mèo chó gà vịt lợn bò ngựa voi khỉ thỏ chim cá rùa ếch trâu hổ chuột kiến ong bướm"),
    "food": _words(
        """cơm phở bún cháo bánh_mì thịt_bò thịt_gà trứng rau_muống đậu_phụ canh_chua cá_rán nem xôi miến
        khoai_lang sữa_chua bánh_cuốn bánh_chưng"""
    ),
    "goods": _words(
        """cam táo chuối xoài nho dứa bưởi ổi đu_đủ nhãn mận lê măng_cụt khoai_tây cà_chua cà_rốt hành gạo
        tôm cua mực tỏi ớt muối đường"""
    ),
    "drink": _words("trà cà_phê sữa nước_cam nước_chanh nước_dừa bia nước_mía"),
    "adj": _words(
        "mới cũ đẹp xấu to nhỏ nặng nhẹ rẻ đắt sạch bẩn dài ngắn tròn vuông cứng mềm mỏng lạ {color} {color}"
    ),
    "color": [f"màu {c}" for c in _words("đỏ xanh vàng trắng đen tím nâu hồng xám")],
    "feel": _words(
        """vui buồn mệt đói khát bận ốm giận lo_lắng hạnh_phúc hiền chăm_chỉ thông_minh lười nhút_nhát dũng_cảm
        cô_đơn nổi_tiếng tốt_bụng cẩn_thận"""
    ),
    "weather": _words("nắng mưa lạnh nóng mát gió ẩm ấm khô nhiều_mây"),
    "weekday": _words("thứ_Hai thứ_Ba thứ_Tư thứ_Năm thứ_Sáu thứ_Bảy Chủ_nhật"),
    "month": [f"tháng {m}" for m in _words("Một Hai Ba Tư Năm Sáu Bảy Tám Chín Mười Mười_Một Mười_Hai")],
    "past": _words(
        """hôm_qua hôm_kia sáng_nay tối_qua tuần_trước tháng_trước năm_ngoái {weekday}_tuần_trước {month}_năm_ngoái
        {#2-20}_ngày_trước"""
    ),
    "future": _words("ngày_mai ngày_kia tuần_sau tháng_sau tối_nay sang_năm {weekday}_tuần_sau {month}_sang_năm"),
    "freq": _words("thường luôn ít_khi hay không_bao_giờ vẫn"),
    "manner": _words("lặng_lẽ vui_vẻ một_mình cùng_nhau rất_lâu chăm_chú"),
    "luck": _words("may_mắn_là thật_tiếc bỗng_nhiên cuối_cùng thực_ra có_lẽ"),
    "daypart": _words("sáng trưa chiều tối"),
    "clock": ["{#1-12} giờ {daypart}", "{#1-12} giờ rưỡi", "{#1-12} giờ {#2-59} phút"],
    "vehicle": _words("tàu xe_khách máy_bay xe_buýt thuyền"),
    "do": _words(
        """mua bán tìm giữ mượn sửa lau mang cất đánh_mất nhặt gửi xem chọn đổi vẽ cầm bỏ_quên đặt làm_hỏng kiểm_tra
        chuyển"""
    ),
    "act": _words(
        """ngủ ngồi_nghỉ hát nhảy_múa bơi chạy_bộ làm_việc học_bài nói_chuyện khóc cười đọc_sách tập_thể_dục câu_cá
        chơi_cờ nấu_ăn đi_dạo xem_phim nghe_nhạc gọi_điện uống_trà"""
    ),
    "cook": _words("nấu ăn gọi chuẩn_bị nếm thích"),
    "meet": _words("gặp thăm giúp_đỡ cảm_ơn đón chờ"),
    "run": _words("chạy ngủ kêu nhảy nằm đứng"),
    "person": _words("{title}_{name} {title}_{name} {kin}_tôi {job}"),
    "who": _words("{person} {person} {person} {person} tôi chúng_tôi họ"),
    "adjthing": ["{thing}", "{thing} {adj}", "{thing} {adj}"],
    "sentence": _lines(
        """
        {past}, {who} {do} {adjthing} ở {place}.
        {past} {who} đã {do} {adjthing}.
        {who} có {do} {adjthing} không?
        {who} đi {city} với {person} {past}.
        {who} {do} {adjthing} ở đâu?
        khi nào {who} sẽ đến {city} gặp {person}?
        {who} {freq} {cook} {food} với {food} vào buổi {daypart}.
        {adjthing} này giá {#2-999} nghìn đồng.
        {adjthing} của {person} giá bao nhiêu tiền?
        {vehicle} đi {city} khởi hành lúc {clock}.
        cho tôi {#2-99} cân {goods} và {#2-20} cân {goods}.
        {who} cần mua {goods}, {goods} và {goods}.
        nếu trời {weather}, {who} sẽ {act} ở {place}.
        vì {person} {feel} nên {who} {act} ở {place}.
        {person} rất {feel}, nhưng {person} lại {feel}.
        {person} có còn {feel} sau khi {act} không?
        {title} {name} ơi, hãy {do} {adjthing} giúp tôi!
        {thing} {color} của {person} đẹp quá!
        con {animal} {color} của {person} đang {run} gần {place}.
        {#2-30} con {animal} và {#2-30} con {animal} {run} ở {place}.
        {title} {name} đã bao giờ thấy con {animal} {color} ở {city} chưa?
        đài báo {future} ở {city} trời sẽ {weather} và {weather}.
        xin chào, tôi tên là {name}, {adjthing} của tôi bị hỏng.
        {person} đã sống ở {city} được {#2-90} năm.
        tại sao {person} {freq} {do} {adjthing}?
        {luck}, {past} {who} {meet} {person} ở {place}.
        {who} không {do} được {thing} nên phải {act} {manner}.
        bạn thích {thing} {color} hay {thing} {color}?
        trong khi {who} {act}, {person} {act} {manner}.
        mời {title} {name} uống một cốc {drink} lúc {clock}.
        trường này có {#100-9999} học sinh và {#2-99} thầy cô.
        """
    ),
}

_VI_DIGITS = _words("không một hai ba bốn năm sáu bảy tám chín")


def _vietnamese_number(n: int) -> str:
    if n < 10:
        return _VI_DIGITS[n]
    if n < 100:
        tens, unit = divmod(n, 10)
        head = "mười" if tens == 1 else f"{_VI_DIGITS[tens]} mươi"
        special = {0: "", 5: "lăm"} if tens == 1 else {0: "", 1: "mốt", 4: "tư", 5: "lăm"}
        return f"{head} {special.get(unit, _VI_DIGITS[unit])}".rstrip()
    if n < 1000:
        head, rest = f"{_VI_DIGITS[n // 100]} trăm", n % 100
    else:
        head, rest = f"{_VI_DIGITS[n // 1000]} nghìn", n % 1000
        if 0 < rest < 100:
            head += " không trăm"
    if not rest:
        return head
    return f"{head} {'linh ' if rest < 10 else ''}{_vietnamese_number(rest)}"


# ---------------------------------------------------------------------------------------------------------- Chinese

_ZH: dict[str, list[str]] = {
    "name": _words(
        """小明 小红 小刚 小丽 小芳 小华 小军 小英 小龙 小雪 小燕 小波 小强 小云 小东 小梅 小文 小玉 小平 小兰 小春
        小海 小杰 小宁 小勇 小虎 小飞 小静"""
    ),
    "surname": _words("王 李 张 刘 陈 杨 黄 赵 周 吴 孙 马 高 林"),
    "title": _words("老师 医生 经理 先生 小姐 同学 教授"),
    "kin": _words("妈妈 爸爸 姐姐 弟弟 爷爷 奶奶 叔叔 阿姨 朋友 邻居 同事 妻子 丈夫 儿子 女儿"),
    "job": _words("司机 记者 护士 警察 农民 工人 歌手 画家 演员"),
    "city": _words(
        """北京 上海 广州 深圳 南京 天津 西安 苏州 武汉 杭州 青岛 大连 昆明 长沙 香港 台湾 英国 法国 美国 日本 德国
        韩国 泰国 巴黎 伦敦 东京"""
    ),
    "place": _words(
        """市场 学校 医院 图书馆 机场 公园 剧院 邮局 饭店 超市 工厂 博物馆 书店 商店 车站 教堂 办公室 咖啡馆
        花园 厨房 体育馆 电影院"""
    ),
    "thing": _words(
        """本书 张桌子 把椅子 辆自行车 张报纸 把刀 张画 顶帽子 件衣服 个灯 块手表 面镜子 个碗 双筷子 封信 支铅笔
        个钱包 个箱子 台电脑 部手机 个枕头 条毛巾 张照片 把雨伞 台电视 个瓶子 双鞋 条裤子 张票 条裙子 面红旗
        个足球 个杯子 张床 个篮子 条船 个玩具 台收音机"""
    ),
    "animal": _words(
        "群猫 条狗 群鸡 群鸭子 头猪 头牛 匹马 头大象 群猴子 群兔子 群鸟 条鱼 群老虎 群羊 条蛇 群老鼠 群熊"
    ),
    "food": _words("米饭 面条 饺子 包子 面包 牛肉 鸡蛋 豆腐 白菜 鱼汤 蛋糕 羊肉 饼干"),
    "goods": _words("苹果 香蕉 葡萄 西瓜 桃子 橘子 土豆 黄瓜 萝卜 洋葱 大米 白糖 茶叶 花生 梨"),
    "drink": _words("茶 咖啡 牛奶 果汁 啤酒 豆浆 冷水"),
    "adj": _words("新 旧 大 漂亮 好看 贵 重 轻 干净 脏 奇怪 普通 有用 舒服 可爱 小 高级 特别"),
    "color": _words("红色 蓝色 绿色 黄色 黑色 白色 紫色"),
    "feel": _words("高兴 累 饿 忙 生气 难过 紧张 有名 年轻 安静 聪明 勇敢 热情 认真 害怕 健康 幸福 懒 奇怪 激动"),
    "weather": _words("下雨 下雪 刮风 很冷 很热 很暖 是晴天 是阴天 有雾"),
    "weekday": [f"星期{d}" for d in "一二三四五六天"],
    "month": [f"{m}月" for m in _words("一 二 三 四 五 六 七 八 九 十 十一 十二")],
    "past": _words("昨天 前天 上个月 去年 今天早上 昨天晚上 刚才 上个{weekday} 去年{month} {#2-20}天以前"),
    "future": _words("明天 后天 下个月 明年 今天晚上 下个{weekday} 明年{month} {#2-20}天以后"),
    "freq": _words("经常 总是 有时候 很少 从来不 一直 每天"),
    "luck": _words("幸运的是 可惜 最后 其实 听说 没想到"),
    "daypart": _words("早上 中午 下午 晚上"),
    "clock": ["{daypart}{#1-12}点", "{#1-12}点半", "{#1-12}点{#11-59}分"],
    "vehicle": _words("火车 飞机 汽车 轮船 马车"),
    "do": _words("买 卖 找 丢 带 拿 藏 借 修 洗 送 看 选 换 检查 用 搬 收 放"),
    "act": _words(
        """做梦 休息 唱歌 跳舞 游泳 跑步 工作 学习 聊天 读书 下棋 做饭 散步 看电影 听广播 打电话 喝茶 写字 画画 开会
        买东西"""
    ),
    "cook": _words("吃 做 点 准备 喜欢"),
    "meet": _words("看见 遇到 帮助 感谢"),
    "run": _words("跑来跑去 休息 喝水 吃东西 玩 叫"),
    "person": _words("{name} {surname}{title} {surname}{title} 我{kin} 那个{job}"),
    "who": _words("{person} {person} {person} {person} 我 我们 他 他们"),
    "sentence": _lines(
        """
        {past}{who}在{place}{do}了一{thing}。
        {who}{past}{do}了{#2-20}{thing}。
        {who}{past}{do}那{thing}了吗？
        {past}，{who}和{person}一起去了{city}。
        {who}在哪里{do}了这{thing}？
        {who}什么时候和{person}去{city}？
        {daypart}{person}{freq}{cook}{food}和{food}。
        这{thing}要{#2-9999}块钱。
        {person}的那{thing}多少钱？
        去{city}的{vehicle}{clock}出发。
        请给我{#2-99}斤{goods}和{#2-20}斤{goods}。
        {who}需要{goods}，{goods}和{goods}。
        如果{future}{weather}，{who}就在{place}{act}。
        因为{person}很{feel}，所以{person}去{place}{act}。
        {person}很{feel}，但是{person}很{feel}。
        {person}{act}以后还{feel}吗？
        {name}，请你{do}一下那{thing}！
        {person}的这{thing}真{adj}！
        {past}那{animal}在{place}附近{run}。
        {#2-30}{animal}和{#2-30}{animal}在{place}里{run}。
        你和{person}在{city}见过{#2-20}{animal}吗？
        广播说，{future}{city}{weather}，{city}{weather}。
        你好，我叫{name}，我{past}买的那{thing}坏了。
        {person}在{city}住了{#2-90}年。
        为什么{person}{freq}{do}这{thing}？
        {luck}，{who}{past}在{place}{meet}了{person}。
        {who}没有{do}那{thing}，只好去{act}。
        你要{color}的那{thing}，还是{color}的那{thing}？
        {who}{act}的时候，{person}正在{act}。
        {clock}，请{surname}{title}来{place}喝一杯{drink}。
        这个{place}里有{#100-9999}个人。
        """
    ),
}

_ZH_DIGITS = "零一二三四五六七八九"


def _chinese_number(n: int, nested: bool = False) -> str:
    """`n` as it is said before a measure word: a lone two, and two hundreds or thousands, are 两."""
    if n < 10:
        return "两" if n == 2 and not nested else _ZH_DIGITS[n]
    if n < 100:
        tens, unit = divmod(n, 10)
        head = "" if tens == 1 and not nested else _ZH_DIGITS[tens]
        return f"{head}十{_ZH_DIGITS[unit] if unit else ''}"
    size, name = (1000, "千") if n >= 1000 else (100, "百")
    head, rest = f"{_chinese_number(n // size)}{name}", n % size
    if not rest:
        return head
    return f"{head}{'零' if rest < size // 10 else ''}{_chinese_number(rest, nested=True)}"


# ---------------------------------------------------------------------------------------------------------- drawing

_GRAMMARS: dict[str, tuple[dict[str, list[str]], Callable[[int], str], int, int]] = {
    "English": (_EN, _english_number, 4, 16),
    "Vietnamese": (_VI, _vietnamese_number, 5, 18),
    "Chinese": (_ZH, _chinese_number, 6, 24),
}


def _expand(text: str, table: dict[str, list[str]], spell: Callable[[int], str], rng: random.Random) -> str:
    used: list[str] = []

    def fill(match: re.Match[str]) -> str:
        slot, form, low, high = match.groups()
        if slot is None:
            return spell(rng.randint(int(low), int(high)))
        entry = rng.choice(table[slot])
        while entry in used and "{" not in entry:  # nobody meets themselves, and no list repeats an item
            entry = rng.choice(table[slot])
        used.append(entry)
        return _SLOT.sub(fill, entry.split("/")[int(form)] if form else entry)

    return _SLOT.sub(fill, text)


def _finish(language: str, text: str) -> str:
    if language == "English":
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:]


def sentence(language: str, rng: random.Random) -> str:
    """One sentence of `language`, with its punctuation and capitals; the same `rng` state gives the same sentence."""
    if language not in _GRAMMARS:
        raise ValueError(f"unknown language {language!r}; known are {', '.join(LANGUAGES)}")
    table, spell, shortest, longest = _GRAMMARS[language]
    while True:
        text = _expand(rng.choice(table["sentence"]), table, spell, rng)
        length = sum(c.isalpha() for c in text) if language == "Chinese" else len(text.split())
        if shortest <= length <= longest:
            return _finish(language, text)
