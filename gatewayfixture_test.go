package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// patience is how long a test waits for what should come at once.
	patience = 10 * time.Second
	// callbackSecret is part of every CALLBACK_URL here, and may be in no log and no answer.
	callbackSecret = "secret-in-the-callback-url"
)

// A gatewayFixture is `sidecast gateway` in this process. The test plays the backend behind it and the clients in front
// of it. When the test is over, the backend must have been told once of the end of each stream that it accepted, and
// the log must contain neither the secret nor a whole token.
type gatewayFixture struct {
	*stubBackend
	t        testing.TB
	addr     string // host:port of the streams
	internal string // base URL of /internal/send and /metrics
	logged   *testOutput
	client   *http.Client
	stop     func() int // does what SIGTERM does, and returns the exit code
}

// newGatewayFixture starts a gateway with settings like "MAX_CONNECTIONS=2 CORS_ALLOW_ORIGIN=*".
func newGatewayFixture(t testing.TB, settings string, answer backendAnswer) *gatewayFixture {
	t.Helper()
	g := &gatewayFixture{stubBackend: newStubBackend(t, answer), t: t}
	g.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	env := settingsEnv("PORT=0 LOG_LEVEL=debug CALLBACK_URL=" + g.server.URL + callbackTarget +
		" HEARTBEAT_INTERVAL_SECONDS=3600 " + settings) // only tests of the heartbeat want to see one
	addr, logged, stop := startRun(t, []string{"gateway"}, env)
	g.addr, g.logged = addr, logged
	g.stop = func() int {
		g.client.CloseIdleConnections()
		return stop()
	}
	t.Cleanup(func() {
		g.stop()
		g.server.Close()
		g.check()
	})
	g.internal = "http://" + g.addr
	if addr := env["INTERNAL_ADDR"]; addr != "" {
		g.internal = "http://" + addr
	}
	return g
}

// serveStreams serves only the streams of a gateway. The fixture has its backend and clients, and nothing else.
func serveStreams(t testing.TB, cfg gatewayConfig) (*gateway, *gatewayFixture) {
	backend := newStubBackend(t, nil)
	cfg.CallbackURL = secret(backend.server.URL + callbackTarget)
	gateway := newGateway(cfg, slog.New(slog.DiscardHandler), newRegistry("test"))
	server := serveTest(t, http.HandlerFunc(gateway.serveStream))
	return gateway, &gatewayFixture{stubBackend: backend, t: t, addr: server.Listener.Addr().String()}
}

// check checks what must hold for every gateway that has ended.
func (g *gatewayFixture) check() {
	logged := g.logged.String()
	if strings.Contains(logged, callbackSecret) {
		g.t.Error("the secret of CALLBACK_URL is in the log")
	}
	_, isBenchmark := g.t.(*testing.B) // a busy machine may not end all of its streams in the 5 s of a shutdown
	for token, n := range g.balance {
		if n != 0 && !isBenchmark {
			g.t.Errorf("connects accepted for a token, less its disconnect callbacks: got %d, want 0", n)
		}
		if strings.Contains(logged, token) {
			g.t.Errorf("a whole token is in the log: %s", token)
		}
	}
}

// dial opens a connection and sends text on it.
func (g *gatewayFixture) dial(text string) *streamClient {
	g.t.Helper()
	return dialTo(g.t, g.addr, text)
}

func dialTo(t testing.TB, addr, text string) *streamClient {
	t.Helper()
	conn, err := (&net.Dialer{Control: smallSocket}).Dial("tcp", addr)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	method, _, _ := strings.Cut(text, " ")
	request, _, _ := strings.Cut(text, "\r\n")
	c := &streamClient{TCPConn: conn.(*net.TCPConn), t: t, wire: bufio.NewReader(conn), method: method, request: request}
	c.write(text)
	return c
}

// smallSocket makes a connection behave like one over a network. Over loopback, 4 MiB may be under way to a client that
// reads nothing, so it would take long to look slow.
func smallSocket(_, _ string, raw syscall.RawConn) (err error) {
	controlErr := raw.Control(func(fd uintptr) {
		err = errors.Join(
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 1400),
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 32<<10))
	})
	return errors.Join(controlErr, err)
}

// request sends a request with headers like "Accept: text/html", and does not wait for the answer.
func (g *gatewayFixture) request(method, target string, headers ...string) *streamClient {
	g.t.Helper()
	lines := append([]string{method + " " + target + " HTTP/1.1", "Host: gateway.test"}, headers...)
	return g.dial(strings.Join(lines, "\r\n") + "\r\n\r\n")
}

func (g *gatewayFixture) get(target string, headers ...string) *streamClient {
	g.t.Helper()
	return g.request("GET", target, headers...)
}

// asked waits until the backend has been asked about the stream that c requests.
func (g *gatewayFixture) asked(c *streamClient) *streamClient {
	g.t.Helper()
	c.callback = receive(g.t, g.connects)
	return c
}

// open opens a stream up to the point where its events begin.
func (g *gatewayFixture) open(target string, headers ...string) *streamClient {
	g.t.Helper()
	c := g.asked(g.get(target, headers...))
	c.begin()
	return c
}

// post posts body to /internal/send and returns the answer in one line: `404 {"error":"…"}`. Any goroutine may call it.
func (g *gatewayFixture) post(contentType, body string) string {
	resp, err := g.client.Post(g.internal+"/internal/send", contentType, strings.NewReader(body))
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	return strconv.Itoa(resp.StatusCode) + " " + strings.TrimSpace(string(answer))
}

// sendText is a POST of body to /internal/send, as it goes over the wire.
func sendText(contentType string, body []byte) string {
	return fmt.Sprintf("POST /internal/send HTTP/1.1\r\nHost: h\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s",
		contentType, len(body), body)
}

const (
	sentOK       = `200 {"status":"ok"}`
	sentBuffered = `200 {"status":"buffered"}`
	sentGone     = `404 {"error":"unknown token"}`
)

// probe asks whether a stream is alive, send sends an event that has only data, and end ends the stream. They return
// what post does.
func (g *gatewayFixture) probe(token string) string {
	return g.post("application/json", fmt.Sprintf(`{"token":%q}`, token))
}

func (g *gatewayFixture) send(token, data string) string {
	return g.post("application/json", fmt.Sprintf(`{"token":%q,"event":{"data":%q}}`, token, data))
}

func (g *gatewayFixture) end(token string) string {
	return g.post("application/json", fmt.Sprintf(`{"token":%q,"close":true}`, token))
}

// metric returns the value of one series of /metrics.
func (g *gatewayFixture) metric(series string) float64 {
	return scrapeValue(scrapeURL(g.client, g.internal), series)
}

// waitMetric waits until a series has the value that it must reach.
func (g *gatewayFixture) waitMetric(series string, want float64) {
	g.t.Helper()
	eventually(g.t, patience, fmt.Sprint(series, " ", want), func() bool { return g.metric(series) == want })
}

// wantMetric checks the value of one series.
func (g *gatewayFixture) wantMetric(series string, want float64) {
	g.t.Helper()
	if got := g.metric(series); got != want {
		g.t.Errorf("%s: got %v, want %v", series, got, want)
	}
}

// wantSend sends an event that has only data to a stream, and checks the answer.
func (g *gatewayFixture) wantSend(c *streamClient, data, want string) {
	g.t.Helper()
	if got := g.send(c.callback.Token, data); got != want {
		g.t.Errorf("%s: sending %.20q: got %s, want %s", c.request, data, got, want)
	}
}

// wantAnswers checks answers of post.
func (g *gatewayFixture) wantAnswers(want string, answers ...string) {
	g.t.Helper()
	for i, got := range answers {
		if got != want {
			g.t.Errorf("answer %d of %d: got %s, want %s", i+1, len(answers), got, want)
		}
	}
}

// wantLive checks that streams get what is sent to them.
func (g *gatewayFixture) wantLive(clients ...*streamClient) {
	g.t.Helper()
	for _, c := range clients {
		g.wantSend(c, "live", sentOK)
		c.wantData("live")
	}
}

// wantNotAsked checks that no connect callback is left to be received.
func (g *gatewayFixture) wantNotAsked() {
	g.t.Helper()
	if n := len(g.connects); n != 0 {
		g.t.Errorf("the backend got %d connect callbacks, want none", n)
	}
}

// A streamClient is a connection to the gateway. It reads only when the test asks it to.
type streamClient struct {
	*net.TCPConn
	t        testing.TB
	method   string
	request  string // its first line
	wire     *bufio.Reader
	body     *bufio.Reader // of the answer, without the framing
	callback callbackCall  // the connect callback of the stream, once the test has received it
}

func (c *streamClient) write(text string) {
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Errorf("writing to the gateway: %v", err)
	}
}

// answer reads the head of the next answer.
func (c *streamClient) answer() *http.Response {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(c.wire, &http.Request{Method: c.method})
	if err == nil && resp.StatusCode == http.StatusContinue {
		resp, err = http.ReadResponse(c.wire, &http.Request{Method: c.method})
	}
	if err != nil {
		c.t.Fatalf("reading an answer: %v", err)
	}
	c.body = bufio.NewReader(resp.Body)
	return resp
}

// reply reads an answer in JSON and returns it in the form of post.
func (c *streamClient) reply() string {
	c.t.Helper()
	resp := c.answer()
	if got := resp.Header.Get("Content-Type"); got != "application/json" && got != "application/x-ndjson" {
		c.t.Errorf("Content-Type: got %q, want application/json or application/x-ndjson", got)
	}
	body, err := c.rest()
	if err != nil {
		c.t.Errorf("reading an answer: %v", err)
	}
	return strconv.Itoa(resp.StatusCode) + " " + strings.TrimSpace(body)
}

// wantReply checks an answer in JSON.
func (c *streamClient) wantReply(want string) {
	c.t.Helper()
	if got := c.reply(); got != want {
		c.t.Errorf("%.100s: got %s, want %s", c.request, got, want)
	}
}

// begin reads the head of a stream and its first line, which is the reconnection time in milliseconds.
func (c *streamClient) begin() (retry int) {
	c.t.Helper()
	resp := c.answer()
	if got := resp.Header.Get("Content-Type"); resp.StatusCode != http.StatusOK || got != "text/event-stream" {
		c.t.Fatalf("got status %d and content type %q, want a stream", resp.StatusCode, got)
	}
	first := c.line()
	retry, err := strconv.Atoi(strings.TrimPrefix(first, "retry: "))
	if err != nil {
		c.t.Fatalf("the stream begins with %q, want retry", first)
	}
	return retry
}

// line reads a line of the stream.
func (c *streamClient) line() string {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	line, err := c.body.ReadString('\n')
	if err != nil {
		c.t.Fatalf("reading a stream: %v after %.100q", err, line)
	}
	return line[:len(line)-1]
}

// event reads up to the next blank line, and returns what is before it.
func (c *streamClient) event() string {
	c.t.Helper()
	lines := []string{c.line()}
	for lines[len(lines)-1] != "" {
		lines = append(lines, c.line())
	}
	return strings.Join(lines[:len(lines)-1], "\n")
}

// rest reads to the end. The error is nil only if the gateway ended the body as HTTP requires.
func (c *streamClient) rest() (string, error) {
	c.SetReadDeadline(time.Now().Add(patience))
	text, err := io.ReadAll(c.body)
	return string(text), err
}

// wantData reads events and checks that they have only this data, of one line each.
func (c *streamClient) wantData(want ...string) {
	c.t.Helper()
	for i, data := range want {
		if got := c.event(); got != "data: "+data {
			c.t.Fatalf("event %d of %d: got %.100q, want data %.100q", i+1, len(want), got, data)
		}
	}
}

// wantEnd checks that the stream ends now, and cleanly.
func (c *streamClient) wantEnd() {
	c.t.Helper()
	if rest, err := c.rest(); rest != "" || err != nil {
		c.t.Errorf("got %.100q, %v; want a clean end of the stream", rest, err)
	}
}

// wantCut checks that the stream ends with an error, so that the client knows that it lacks something.
func (c *streamClient) wantCut() {
	c.t.Helper()
	if _, err := c.rest(); err == nil {
		c.t.Error("got a clean end of the stream, want an error")
	}
}

// wantTransient reads a stream that only tells the browser to come back, and why. It ends a second later.
func (c *streamClient) wantTransient(reason string) (retry int) {
	c.t.Helper()
	retry = c.begin()
	if got, want := c.line(), ": "+reason; got != want {
		c.t.Errorf("got %q, want %q", got, want)
	}
	return retry
}

// reset closes the connection in such a way that the gateway's next read or write fails.
func (c *streamClient) reset() {
	c.SetLinger(0)
	c.Close()
}

// A backendAnswer answers a callback; nil accepts. Its answer to a disconnect callback has no effect.
type backendAnswer func(w http.ResponseWriter, c callbackCall)

func answering(status int, body string) backendAnswer {
	return func(w http.ResponseWriter, _ callbackCall) {
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// holding answers callbacks of one action when gate is closed, and others at once.
func holding(action string, gate <-chan struct{}, answer backendAnswer) backendAnswer {
	return func(w http.ResponseWriter, c callbackCall) {
		if c.Action == action {
			c.await(gate)
		}
		answer(w, c)
	}
}

// A callbackCall is a callback as it came.
type callbackCall struct {
	Action, Reason, Token string
	Request               struct {
		URL     string
		Headers map[string]string
	}
	body    string
	header  http.Header
	givenUp <-chan struct{} // closed when the gateway no longer waits for the answer
}

// await holds the answer back until gate is closed. If the gateway gives up the callback meanwhile, it gets no answer.
func (c callbackCall) await(gate <-chan struct{}) {
	select {
	case <-gate:
	case <-c.givenUp:
		panic(http.ErrAbortHandler)
	}
}

// number returns 410 for the target /410.
func (c callbackCall) number() int {
	n, _ := strconv.Atoi(strings.TrimPrefix(c.Request.URL, "/"))
	return n
}

// callbackTarget is the request target of the stub backend's callbacks.
const callbackTarget = "/callback?secret=" + callbackSecret

// A stubBackend takes callbacks.
type stubBackend struct {
	server      *httptest.Server
	t           testing.TB
	answer      backendAnswer
	connects    chan callbackCall // in the order of arrival, before they are answered
	disconnects chan callbackCall

	mu      sync.Mutex
	balance map[string]int // by token: connects accepted less disconnects
}

func newStubBackend(t testing.TB, answer backendAnswer) *stubBackend {
	t.Helper()
	needsOwnGateway(t)
	if answer == nil {
		answer = answering(http.StatusOK, "")
	}
	b := &stubBackend{
		t:           t,
		answer:      answer,
		connects:    make(chan callbackCall, 1<<14),
		disconnects: make(chan callbackCall, 1<<14),
		balance:     map[string]int{},
	}
	b.server = httptest.NewServer(b)
	t.Cleanup(b.server.Close)
	return b
}

func (b *stubBackend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	c := callbackCall{body: string(body), header: r.Header, givenUp: r.Context().Done()}
	if err == nil {
		err = json.Unmarshal(body, &c)
	}
	if err != nil || r.Method != "POST" || r.RequestURI != callbackTarget || r.Header.Get("Content-Type") != "application/json" ||
		r.Header.Get("Sse-Gateway-Features") != "batch, id, retry, heartbeat" {
		b.t.Errorf("got an odd callback: %s %s, %v, %s, %v", r.Method, r.RequestURI, r.Header, body, err)
	}
	sw := &statusWriter{w, http.StatusOK}
	switch c.Action {
	case "connect":
		b.note(b.connects, c)
		b.answer(sw, c)
		if sw.status/100 == 2 {
			b.count(c.Token, +1)
		}
	case "disconnect":
		b.note(b.disconnects, c)
		b.count(c.Token, -1)
		b.answer(sw, c)
	default:
		b.t.Errorf("got a callback with action %q", c.Action)
	}
}

// note keeps a callback for the test, which need not look at it.
func (b *stubBackend) note(calls chan<- callbackCall, c callbackCall) {
	select {
	case calls <- c:
	default:
		b.t.Errorf("more than %d callbacks, the last one is %s", cap(calls), c.body)
	}
}

func (b *stubBackend) count(token string, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.balance[token] += n
}

// wantDisconnect waits for a disconnect callback of the stream that c opened.
func (b *stubBackend) wantDisconnect(c *streamClient, reason string) {
	b.t.Helper()
	got := receive(b.t, b.disconnects)
	if got.Token != c.callback.Token || got.Reason != reason {
		b.t.Errorf("%s: got the end of %s, reason %q; want of %s, %q", c.request, got.Token, got.Reason, c.callback.Token, reason)
	}
}

// A statusWriter remembers the status that was answered.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// receive receives a value that must come within patience.
func receive[T any](t testing.TB, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatalf("no %T within %v", v, patience)
	}
	return v
}

// jsonValue returns text as encoding/json decodes it.
func jsonValue(t testing.TB, text string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}
