// The run panel. It asks for a look about once a second, shows what it is told, and decides nothing itself.

const RUNNING = 1000; // milliseconds between two looks while a job runs
const RESTING = 4000; // and while none does: one may be started elsewhere
const PATIENCE = 6000; // an answer later than this means that the kernel does something else

function render({ model, el }) {
  const root = rootOf(el, "run");
  let timer = null;
  let late = null;
  let ended = false;

  const ask = (what) => {
    clearTimeout(late);
    late = setTimeout(() => say("info", "The notebook's kernel is busy or gone. A job goes on without it."), PATIENCE);
    model.send(what);
    again(3 * RESTING); // should no answer come
  };
  const again = (milliseconds) => {
    clearTimeout(timer);
    if (!ended) timer = setTimeout(() => ask({ do: "look" }), milliseconds);
  };
  const start = (last) => {
    for (const button of root.querySelectorAll("[data-do=start]")) button.disabled = true;
    say("info", "starting …");
    ask({ do: "start", last, yes: !allTheSame.hidden && yes.checked });
  };
  const said = element("div", { role: "status", "aria-live": "off", "data-total": "job", class: "dq-grow" });
  const cancel = element("button", { type: "button", "data-do": "cancel", onclick: () => (say("info", "cancelling …"), ask({ do: "cancel" })) }, "Cancel");
  const body = element("tbody");
  const log = element("pre", { tabindex: "0", "aria-label": "last lines of the log", "data-total": "log" });
  const details = element("details", { open: true }, element("summary", { class: "dq-soft" }, "log"), log);
  const message = element("div", { class: "dq-message", role: "status", "aria-live": "polite" });
  const yes = element("input", { type: "checkbox", "data-do": "yes" });
  const allTheSame = element("label", { hidden: true }, yes, " go on all the same");
  const folder = element("div", { class: "dq-soft dq-row" });
  root.append(folder, element("table", { "aria-label": "steps of the run" }, body), element("div", { class: "dq-row" }, cancel, said), message, allTheSame, details);

  function say(kind, text) {
    message.dataset.kind = text ? kind : "info";
    message.textContent = text;
  }

  /** The rows are made once and then only told anew, so that the focus stays where it is. */
  function rowOf(name) {
    const state = element("td");
    const bar = element("progress", { max: "1", hidden: true, "aria-label": `progress of ${name}` });
    const press = element("button", { type: "button", "data-do": "start", "data-step": name, onclick: () => start(name) }, "Run to here");
    return { name, state, bar, press, node: element("tr", {}, element("th", { scope: "row" }, name), state, element("td", {}, press), element("td", {}, bar)) };
  }
  let rows = [];

  function show() {
    const { folder: place, steps, job, log: lines } = model.get("shown");
    clearTimeout(late);
    const running = job?.state === "running";
    if (rows.map(({ name }) => name).join("\n") !== steps.map(([name]) => name).join("\n")) {
      rows = steps.map(([name]) => rowOf(name));
      body.replaceChildren(...rows.map(({ node }) => node));
    }
    steps.forEach(([name, state], i) => {
      rows[i].state.textContent = state;
      rows[i].state.dataset.state = state;
      rows[i].press.disabled = running;
      const own = running && job.at === name;
      rows[i].bar.hidden = !own;
      if (own && job.part !== null) rows[i].bar.value = job.part;
      else rows[i].bar.removeAttribute("value");
    });
    folder.textContent = `run folder ${place}`;
    if (running && job.dashboard) folder.append(element("a", { href: job.dashboard, target: "_blank", rel: "noreferrer" }, "the cluster's dashboard"));
    cancel.disabled = !running;
    said.textContent = job ? job.said : "no job yet";
    said.dataset.state = job?.state ?? "";
    if (job?.state === "refused" && allTheSame.hidden) yes.checked = false; // each refusal is answered anew
    allTheSame.hidden = job?.state !== "refused";
    details.hidden = lines.length === 0;
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
    log.textContent = lines.join("\n");
    if (atEnd) log.scrollTop = log.scrollHeight;
    tell();
    again(running ? RUNNING : RESTING);
  }

  /** Python's word, else how the last job failed. */
  function tell() {
    const { kind = "info", text = "" } = model.get("message");
    const job = model.get("shown").job;
    clearTimeout(late);
    if (text) say(kind, text);
    else say(job?.state === "cancelled" ? "info" : "error", job?.error ?? "");
    for (const { press } of rows) press.disabled = job?.state === "running";
  }

  const ends = [follow(model, ["shown"], show), follow(model, ["message"], tell)];
  return () => {
    ended = true;
    clearTimeout(timer);
    clearTimeout(late);
    ends.forEach((end) => end());
  };
}

export default { render };
