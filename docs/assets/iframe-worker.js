// Makes the search work on pages that are opened from the disk, where browsers refuse to start
// workers: the worker's script runs in a hidden frame instead.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      // A message that arrives before the script has run would be lost.
      this.ready = new Promise((resolve) => frame.addEventListener("ready", resolve));
      this.frame = frame;
      const page = frame.contentDocument;
      page.open();
      frame.contentWindow.postMessage = (data) => this.deliver(this, data);
      page.write(
        `<script>
          importScripts = (...urls) => urls.reduce((loaded, url) => loaded.then(() =>
            new Promise((resolve) => {
              const script = document.createElement("script");
              script.src = url;
              script.onload = resolve;
              document.body.appendChild(script);
            })), Promise.resolve());
        </` + `script><body><script src="${url}"></` + `script><script>
          frameElement.dispatchEvent(new Event("ready"));
        </` + `script></body>`,
      );
      page.close();
    }

    deliver(target, data) {
      setTimeout(() => target.dispatchEvent(new MessageEvent("message", { data })));
    }

    postMessage(data) {
      this.ready.then(() => this.deliver(this.frame.contentWindow, data));
    }

    terminate() {
      this.frame.remove();
    }
  }
  window.IFrameWorker = window.Worker = IFrameWorker;
}
