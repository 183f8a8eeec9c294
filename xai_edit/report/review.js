// Marks of findings: verdict, name, threshold, ticks and note, kept in the browser and saved.
const review = document.querySelector("#review");

function bytes(text) {
  return Uint8Array.from(atob(text), (one) => one.charCodeAt(0)).buffer;
}

// Wilson's 95 % interval of a share.
function interval(right, count) {
  const z = 1.959963984540054;
  const share = right / count;
  const middle = share + (z * z) / (2 * count);
  const half = z * Math.sqrt((share * (1 - share)) / count + (z * z) / (4 * count * count));
  return [middle - half, middle + half].map((end) => end / (1 + (z * z) / count));
}

function percent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

if (review) {
  const about = JSON.parse(review.dataset.about);
  const truth = new Int32Array(bytes(review.dataset.truth));
  const right = review.dataset.right && new Uint8Array(bytes(review.dataset.right));
  const place = `xai_edit.marks.${about.discovery}`;
  const output = review.querySelector(".saving textarea");
  const state = {}; // mark by the number of a finding
  try {
    const kept = JSON.parse(localStorage.getItem(place) ?? "{}");
    for (const card of review.querySelectorAll(".finding"))
      if (kept[card.dataset.finding]) state[card.dataset.finding] = kept[card.dataset.finding];
  } catch {} // nothing is kept where storage is blocked

  const cards = [...review.querySelectorAll(".finding")].map((card) => {
    const number = card.dataset.finding;
    const scores = new (card.dataset.bits === "32" ? Float32Array : Float64Array)(
      bytes(card.dataset.scores));
    const target = Number(card.dataset.target);
    const original = Number(card.dataset.threshold);
    const highest = Number(card.dataset.highest);
    const [slider, name, note] = ["range", "name", "note"].map((one) =>
      card.querySelector(`.${one}`));
    const verdicts = [...card.querySelectorAll("[type=radio]")];
    const ticks = [...card.querySelectorAll("[type=checkbox]")];
    const mark = () =>
      (state[number] ??= { verdict: null, threshold: null, name: "", note: "", ticks: {} });

    function present() {
      const threshold = state[number]?.threshold ?? original;
      return Array.from(scores, (score) => score > threshold);
    }

    function has() {
      const found = present();
      for (const [sample, value] of Object.entries(state[number]?.ticks ?? {}))
        found[sample] = value;
      return found;
    }

    // Samples near the threshold that nobody ticked.
    function unsure() {
      const own = state[number];
      const threshold = own?.threshold ?? original;
      return Array.from(scores).filter((score, sample) =>
        Math.abs(score - threshold) <= about.unsure * threshold &&
        !(sample in (own?.ticks ?? {}))).length;
    }

    function draw() {
      const own = state[number];
      const threshold = own?.threshold ?? original;
      const at = highest > 0 ? Math.sqrt(threshold / highest) : 0;
      const line = card.querySelector(".threshold");
      for (const end of ["x1", "x2"]) line.setAttribute(end, at * Number(card.dataset.width));
      const found = has();
      const count = [0, 0, 0, 0];
      const correct = [0, 0, 0, 0];
      found.forEach((value, sample) => {
        const group = (truth[sample] === target ? 0 : 2) + (value ? 0 : 1);
        count[group] += 1;
        if (right) correct[group] += right[sample];
      });
      const changed = own?.threshold != null || Object.keys(own?.ticks ?? {}).length > 0;
      [...card.querySelectorAll(".groups tbody tr")].forEach((row, group) => {
        row.cells[1].textContent = count[group] || "0 (empty)";
        if (right) row.cells[2].textContent = count[group]
          ? percent(correct[group] / count[group]) + (count[group] < 10
            ? ` [${interval(correct[group], count[group]).map(percent).join(", ")}]` : "")
          : "–";
        const ablated = row.cells[row.cells.length - 1];
        ablated.textContent = changed ? "–" : ablated.dataset.found;
      });
      const total = count[0] + count[2];
      slider.setAttribute("aria-valuetext", `${total} of ${found.length} samples have the feature`);
      card.querySelector(".total").textContent = `${total} of ${found.length} samples have it`;
    }

    function set(change) {
      Object.assign(mark(), change);
      draw();
      keep();
    }

    slider.value = Math.sqrt((state[number]?.threshold ?? original) / (highest || 1));
    name.value = state[number]?.name ?? "";
    note.value = state[number]?.note ?? "";
    for (const one of verdicts) one.checked = state[number]?.verdict === one.value;
    for (const one of ticks) one.checked = one.dataset.sample in (state[number]?.ticks ?? {});
    slider.addEventListener("input", () => set({ threshold: slider.value ** 2 * highest }));
    card.querySelector(".reset").addEventListener("click", () => {
      slider.value = Math.sqrt(original / (highest || 1));
      set({ threshold: null });
    });
    name.addEventListener("input", () => set({ name: name.value }));
    note.addEventListener("input", () => set({ note: note.value }));
    for (const one of verdicts)
      one.addEventListener("change", () => set({ verdict: one.value }));
    for (const one of ticks)
      one.addEventListener("change", () => {
        const own = { ...mark().ticks };
        if (one.checked) own[one.dataset.sample] = one.dataset.has === "true";
        else delete own[one.dataset.sample];
        set({ ticks: own });
      });
    // Tab stops once at a row of pictures; arrow keys go along it.
    for (const row of card.querySelectorAll(".thumbs")) {
      const boxes = [...row.querySelectorAll("input")];
      boxes.forEach((box, at) => {
        box.tabIndex = at ? -1 : 0;
        box.addEventListener("keydown", (event) => {
          const next = { ArrowLeft: boxes[at - 1], ArrowRight: boxes[at + 1], Home: boxes[0],
            End: boxes.at(-1) };
          if (!(event.key in next)) return;
          event.preventDefault();
          next[event.key]?.focus();
        });
        box.addEventListener("focus", () => {
          for (const other of boxes) other.tabIndex = other === box ? 0 : -1;
        });
      });
    }
    draw();
    return { number, has, present, unsure, separation: Number(card.dataset.separation) };
  });

  function marks() {
    const spurious = cards.filter(({ number }) => state[number]?.verdict === "spurious");
    const found = spurious.map(({ has }) => has());
    const present = spurious.map((one) => one.present());
    const samples = Array.from(truth, (_, sample) => ({
      sample: about.names[sample] ?? sample,
      attribute: found.some((one) => one[sample]),
      present: present.some((one) => one[sample]),
    }));
    const findings = cards.filter(({ number }) => state[number]?.verdict).map((card) => ({
      finding: Number(card.number), ...state[card.number], separation: card.separation,
      unsure: card.unsure() }));
    const { discovery, model, data } = about;
    return { kind: "xai_edit.marks", format: 1, discovery, model, data, findings, samples };
  }

  function keep() {
    const marked = cards.filter(({ number }) => state[number]?.verdict).length;
    const open = Object.values(state).filter((one) => !one.verdict).length;
    review.querySelector(".status").textContent = `${marked} of ${cards.length} findings marked` +
      (open ? `; ${open} changed without a verdict, which are not saved` : "");
    output.value = JSON.stringify(marks(), null, 1);
    try {
      localStorage.setItem(place, JSON.stringify(state));
    } catch {} // blocked
  }

  review.querySelector(".save").addEventListener("click", () => {
    const link = document.createElement("a");
    const file = new Blob([`${JSON.stringify(marks(), null, 1)}\n`], { type: "application/json" });
    link.href = URL.createObjectURL(file);
    link.download = "marks.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
  review.querySelector(".forget").addEventListener("click", () => {
    if (!confirm("Forget all marks on this page?")) return;
    try {
      localStorage.removeItem(place);
    } catch {} // blocked
    location.reload();
  });
  keep();
}
