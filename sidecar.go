// The gateway role: it holds the browsers' streams, and ends them in order. What it asks the backend and tells it is in
// ask.go, whom it refuses in refuse.go, one stream in stream.go, and how events come in send.go. Tasks, versions and
// identifiers are not known here.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxTarget      = 8 << 10  // bytes of a stream's request target; beyond it 414
	maxRequest     = 16 << 10 // bytes of what a stream keeps of its request, in JSON
	maxAnswer      = 1 << 20  // bytes of the answer to a connect callback
	callbackLimit  = 5 * time.Second
	callbackBuffer = 2 << 10 // bytes that a connection to the backend buffers each way

	// maxConnecting and maxDisconnecting bound the callbacks under way. A connect callback gives up after
	// callbackLimit, with the wait for its turn; a disconnect callback waits for its turn for disconnectLimit. Then it
	// counts as a timeout.
	maxConnecting    = 256
	maxDisconnecting = 32
	disconnectLimit  = 30 * time.Second

	// askingGrace is how long a shutdown waits for connect callbacks. Then their clients are told to come back.
	askingGrace = 2 * time.Second

	// Streams that are ended together end a millisecond apart, but within endSpread in all, so that the browsers do not
	// come back all at once.
	endSpread = 3 * time.Second
)

// gateway is the gateway role: it holds the browsers' streams, asks the backend who may connect, tells it who left, and
// takes events from it.
type gateway struct {
	cfg       gatewayConfig
	log       *slog.Logger
	met       *gatewayMetrics
	transport http.RoundTripper

	// backend takes a callback if it is in this process. It must not take long. It is nil if callbacks are posted.
	backend func(c callback) (status int, answer []byte)

	connecting    chan struct{} // a slot for each connect callback under way
	disconnecting chan struct{}
	asking        context.Context // ends the connect callbacks
	stopAsking    context.CancelFunc
	life          context.Context // ends with the shutdown: nothing new is taken, and no refused client waits any more
	endLife       context.CancelFunc
	held          atomic.Int64 // refused clients that are waiting

	full, failed, misdirected throttle // limit what is logged of each

	posts *postLoop // serves /internal/send on connections that stay open

	name     string        // of this run, in orderHeader
	requests atomic.Uint64 // requests for streams, so far

	shards [16]shard    // by the last digit of the token
	count  atomic.Int64 // registered streams

	// Counts requests for streams until their answer, streams and held refusals until their end, disconnect callbacks,
	// and resets.
	tracker
}

// shard is a part of the streams. Heartbeats visit one shard at a time, so that the writes are spread over the
// interval.
type shard struct {
	mu      sync.Mutex         // guards streams
	streams map[string]*stream // by token
}

func newGateway(cfg gatewayConfig, log *slog.Logger, reg *registry) *gateway {
	g := &gateway{
		cfg: cfg,
		log: log,
		met: newGatewayMetrics(reg),
		transport: &http.Transport{
			DialContext:         dial,
			TLSHandshakeTimeout: dialLimit,
			MaxIdleConnsPerHost: maxConnecting + maxDisconnecting,
			IdleConnTimeout:     10 * time.Second, // after many connects at once they would cost more than the streams
			ReadBufferSize:      callbackBuffer,
			WriteBufferSize:     callbackBuffer,
			DisableCompression:  true,
		},
		connecting:    make(chan struct{}, maxConnecting),
		disconnecting: make(chan struct{}, maxDisconnecting),
		name:          newEpoch(),
	}
	g.asking, g.stopAsking = context.WithCancel(context.Background())
	g.life, g.endLife = context.WithCancel(context.Background())
	for i := range g.shards {
		g.shards[i].streams = map[string]*stream{}
	}
	g.posts = &postLoop{poster: g}
	reg.value("gateway_streams", "Streams that are open or being opened.", func() float64 { return float64(g.count.Load()) })
	return g
}

// serveStream answers every request that is not for one of the gateway's own paths. It opens a stream if the backend
// accepts that.
func (g *gateway) serveStream(w http.ResponseWriter, r *http.Request) {
	uncounted(w)
	g.allowOrigin(w.Header())
	if g.isPreflight(r) {
		servePreflight(w)
		return
	}
	request, refused := g.checkRequest(w, r)
	if refused != nil {
		g.refuse(w, r, refused)
		return
	}
	g.busy.Add(1)
	defer g.busy.Add(-1)
	s, refused := g.register(r, request)
	if refused != nil {
		g.refuse(w, r, refused)
		return
	}
	answer, refused := g.connect(r, s)
	if refused != nil {
		g.unregister(s)
		g.refuse(w, r, refused)
		return
	}
	g.open(w, s, answer)
}

// register makes a stream for the request, unless there is no room or the gateway is shutting down.
func (g *gateway) register(r *http.Request, request json.RawMessage) (*stream, *refusal) {
	if n := g.count.Add(1); g.cfg.MaxConnections > 0 && n > int64(g.cfg.MaxConnections) {
		g.count.Add(-1)
		g.full.log(g.log, slog.LevelWarn, "streams are turned away: MAX_CONNECTIONS is reached", "limit", g.cfg.MaxConnections)
		return nil, &refusal{http.StatusServiceUnavailable, refusedCapacity, "no capacity"}
	}
	s := &stream{token: newToken(), chunked: r.ProtoAtLeast(1, 1), cfg: &g.cfg}
	if g.backend == nil {
		s.request = request
	}
	sh := g.shard(s.token[len(s.token)-1])
	sh.mu.Lock()
	sh.streams[s.token] = s
	sh.mu.Unlock()
	if g.life.Err() != nil { // looked at when it is in the map, so that shutdown misses none
		g.unregister(s)
		return nil, explain(g.life.Err())
	}
	return s, nil
}

func (g *gateway) unregister(s *stream) {
	sh := g.shard(s.token[len(s.token)-1])
	sh.mu.Lock()
	delete(sh.streams, s.token)
	sh.mu.Unlock()
	g.count.Add(-1)
}

// shard returns the shard of the tokens with this last digit, a hexadecimal one. It takes any other byte, too.
func (g *gateway) shard(digit byte) *shard {
	return &g.shards[strings.IndexByte("0123456789abcdef", digit)&15]
}

// lookup returns the stream of a token, which is not empty.
func (g *gateway) lookup(token []byte) *stream {
	sh := g.shard(token[len(token)-1])
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.streams[string(token)]
}

// open begins a stream that the backend has accepted.
func (g *gateway) open(w http.ResponseWriter, s *stream, a *callbackAnswer) {
	first := appendRetry(reserveChunk(nil), g.retry())
	if a.event.data != nil {
		first = appendEvent(first, a.event)
	}
	s.beatEvent = a.beatEvent
	g.met.opened.Inc()
	g.log.Debug("stream opened", "token", mask(s.token))
	g.begin(w, s, first, a.end)
	g.spawn(func() { g.watch(s) })
}

// begin takes the connection over from net/http, whose buffers and goroutine cost several times what the stream does,
// and begins s with first, which was begun by reserveChunk. It reports whether that was possible.
func (g *gateway) begin(w http.ResponseWriter, s *stream, first []byte, end bool) bool {
	header := w.Header()
	header.Set("Content-Type", "text/event-stream")
	header.Set("Cache-Control", "no-cache, no-transform")
	header.Set("X-Accel-Buffering", "no") // nginx
	header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	header.Set("Connection", "close")
	if s.chunked {
		header.Set("Transfer-Encoding", "chunked")
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		g.log.Error("taking over a connection", "err", err)
		s.cut(streamError)
		return false
	}
	head := bytes.NewBuffer(make([]byte, 0, 512))
	head.WriteString("HTTP/1.1 200 OK\r\n")
	header.Write(head)
	head.WriteString("\r\n")
	head.Write(s.chunk(&first))
	s.open(conn, head.Bytes(), end)
	if rw.Reader.Buffered() > 0 {
		s.cut(clientClosed) // it has sent more than its request
	}
	return true
}

// watch waits for the end of a stream that was accepted, and tells the backend of it. Read returns when the client
// leaves or sends anything, or when the gateway has closed conn.
func (g *gateway) watch(s *stream) {
	if s.conn != nil { // nil if it could not be taken over
		s.conn.Read(make([]byte, 1))
	}
	s.cut(clientClosed)
	g.unregister(s)
	g.met.closed.with(s.reason).Inc()
	g.log.Debug("stream closed", "token", mask(s.token), "reason", s.reason)
	g.disconnect(s, s.reason)
}

// work starts what the gateway does besides answering, until ctx ends: it writes heartbeats, and cuts clients that are
// stuck. Opening a stream takes several times the memory that the stream keeps; after an interval in which streams were
// opened that is given back.
func (g *gateway) work(ctx context.Context) {
	go g.walk(ctx, g.cfg.WriteTimeout/4, (*stream).cutIfStuck)
	go g.walk(ctx, g.cfg.Heartbeat, (*stream).beat)
	before := g.met.opened.Load()
	go every(ctx, g.cfg.Heartbeat, func() {
		if opened := g.met.opened.Load(); opened != before {
			before = opened
			debug.FreeOSMemory()
		}
	})
}

// walk visits every stream once an interval, one shard after the other, until ctx ends.
func (g *gateway) walk(ctx context.Context, interval time.Duration, visit func(*stream)) {
	i := 0
	every(ctx, interval/time.Duration(len(g.shards)), func() {
		for _, s := range g.shards[i].all() {
			visit(s)
		}
		i = (i + 1) % len(g.shards)
	})
}

func (sh *shard) all() []*stream {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return slices.AppendSeq(make([]*stream, 0, len(sh.streams)), maps.Values(sh.streams))
}

// shutdown takes no new streams, ends those that are open, spread over time, and waits for their disconnect callbacks,
// and for the answers to sends, until ctx ends.
func (g *gateway) shutdown(ctx context.Context) {
	g.endLife()
	time.AfterFunc(askingGrace, g.stopAsking)
	g.endAll(ctx, g.all())
	if left := g.wait(ctx); left > 0 {
		g.log.Warn("ending with streams or disconnect callbacks under way", "count", left)
	}
	g.posts.wait(ctx)
}

func (g *gateway) all() (streams []*stream) {
	for i := range g.shards {
		streams = append(streams, g.shards[i].all()...)
	}
	return streams
}

// endAll ends the streams, a few in each millisecond.
func (g *gateway) endAll(ctx context.Context, streams []*stream) {
	step := len(streams)/int(endSpread/(2*time.Millisecond)) + 1 // a timer may be late by as much again
	for batch := range slices.Chunk(streams, step) {
		for _, s := range batch {
			s.finish()
		}
		sleep(ctx, time.Millisecond)
	}
}

// serveReset is POST /internal/reset, by which a backend that has just started says that it knows none of the streams.
// They end, and the browsers come back. The secret in CALLBACK_URL, if there is one, must be the bearer token.
func (g *gateway) serveReset(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	u, _ := url.Parse(string(g.cfg.CallbackURL)) // which config.go has parsed before
	want := u.Query().Get("secret")
	switch {
	case !hasMediaType(r, jsonType): // a form of another site cannot send this type
		return 0, nil, errMediaType
	case want != "" && !hasBearer(r.Header.Get("Authorization"), secret(want)):
		return 0, nil, errWrongSecret
	}
	streams := g.all() // before the answer: after it there may be new ones
	g.log.Info("ending the streams of an earlier backend", "streams", len(streams))
	g.spawn(func() { g.endAll(context.Background(), streams) })
	return http.StatusOK, map[string]string{"status": "ok"}, nil
}

// serveReady is GET /readyz.
func (g *gateway) serveReady(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	configured := g.cfg.CallbackURL != ""
	status, said := readiness(configured && g.life.Err() == nil)
	return status, map[string]any{"status": said, "configured": configured}, nil
}
