// Browsers start no worker for a page that is opened from a disk. The search's runs
// in a hidden frame then, with the two calls by which a worker is spoken to.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inside.document.createElement("script");
      this.ready = new Promise((done) => (script.onload = done));
      script.src = address;
      inside.document.body.append(script);
      this.postMessage = (data) =>
        this.ready.then(() =>
          inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }
  };
}
