// Browsers start no worker from a file. Where the site is read without a server, the search runs in a hidden frame
// instead, which may load scripts. (The offline plugin would fetch such a script from elsewhere, unless one with this
// name is there.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      const script = inside.document.createElement("script")
      const tell = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }))
      this.postMessage = data => waiting.push(data)
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      script.onload = () => {
        this.postMessage = data => setTimeout(() => tell(inside, data))
        waiting.forEach(this.postMessage)
      }
      script.src = url
      inside.document.head.append(script)
    }
  }
}
