// Ratios to the baseline, or to the configuration that the reader chose in its place.
const ratiosOf = (data) => {
  const speed = data.derived.tokens_per_s;
  // (group, length) -> the fastest record of each configuration there.
  const groupOf = [];
  data.groups.forEach((group, g) => group.records.forEach((i) => (groupOf[i] = g)));
  const where = (i) => `${groupOf[i]} ${data.records[i].seq_len}`;
  const best = new Map();
  data.records.forEach((_, i) => {
    if (speed[i] === null) return;
    const key = `${where(i)} ${data.configuration[i]}`;
    if (!best.has(key) || speed[i] > speed[best.get(key)]) best.set(key, i);
  });
  let chosen = -1;
  const opponent = (i) => (chosen < 0 ? data.baseline[i] : (best.get(`${where(i)} ${chosen}`) ?? -1));
  const ratio = (i) => {
    if (chosen < 0) return data.derived.ratio_to_baseline[i];
    const other = opponent(i);
    return other < 0 || speed[i] === null || speed[other] === null ? null : speed[i] / speed[other];
  };
  const interval = (i) => {
    if (chosen < 0) {
      const [low, high] = [data.derived.ratio_low[i], data.derived.ratio_high[i]];
      return low === null || high === null ? null : [low, high];
    }
    const other = opponent(i), r = ratio(i);
    if (r === null || other === i) return null;
    const [mine, theirs] = [data.records[i], data.records[other]];
    if (!mine.interval_s || !theirs.interval_s || mine.interval_s[0] <= 0) return null;
    const scale = (r * mine.step_s) / theirs.step_s;
    if (mine.kind === "measured") return ofSamples(scale, mine.samples_s, theirs.samples_s);
    return [(scale * theirs.interval_s[0]) / mine.interval_s[1], (scale * theirs.interval_s[1]) / mine.interval_s[0]];
  };
  // As longreel.reports.turns.compare, for throughputs.
  const ofSamples = (scale, mine, theirs) => {
    if (Math.min(mine.length, theirs.length, ...mine, ...theirs) <= 0) return null;
    const quotients = mine.flatMap((a) => theirs.map((b) => (scale * b) / a)).sort((a, b) => a - b);
    const out = data.rules.left_out[[mine.length, theirs.length].sort((a, b) => a - b).join(" ")];
    return [quotients[out], quotients[quotients.length - 1 - out]];
  };
  // As longreel.reports.verdicts: the rule is about times, the inverse of throughputs.
  const verdict = (i) => {
    if (chosen < 0) return data.derived.verdict[i];
    const other = opponent(i), bounds = interval(i), { margin } = data.rules;
    if (!bounds || !data.judged[i] || !data.judged[other]) return null;
    if (1 / bounds[1] >= 1 - margin && 1 / bounds[0] <= 1 + margin) return "SAME";
    if (bounds[0] > 1) return "FAST";
    return bounds[1] < 1 ? "SLOW" : "AMBIGUOUS";
  };
  return {
    choose: (configuration) => (chosen = configuration),
    isDefault: () => chosen < 0,
    isOpponent: (i) => opponent(i) === i,
    name: () => (chosen < 0 ? null : data.configurations[chosen]),
    ratio,
    interval,
    verdict,
  };
};

const drawHeat = (data, ratios) => {
  const level = (ratio) => {
    if (!ratio) return 0;
    const { levels } = data.rules;
    return Math.max(-levels, Math.min(levels, Math.floor(levels * Math.log2(ratio) + 0.5 + 1e-6)));
  };
  for (const shown of document.querySelectorAll(".heat td[data-i]")) {
    const i = Number(shown.dataset.i), ratio = ratios.ratio(i), { status } = data.records[i];
    shown.textContent = ratio !== null ? ratio.toFixed(2) : status !== "ok" ? status : "–";
    const step = level(ratio);
    shown.className = [step ? (step > 0 ? `u${step}` : `d${-step}`) : "", shown.classList.contains("best") ? "best" : ""]
      .filter(Boolean)
      .join(" ");
  }
};
