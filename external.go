// External tasks, which are worked on elsewhere and reported over HTTP: how they begin, their reports, and the handlers
// of these. What happens to a task is in tasks.go.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// externalTask is the kind of task that is worked on elsewhere and reported over HTTP.
const externalTask = "external"

// plainChars are those that a chosen task_id may have: what stands in the path of a URL as it is, so that whoever looks
// at that path sees the same task.
const plainChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=@"

var (
	errBadTaskID = badRequest("bad_id", "task_id must be 1 to 128 of A-Z a-z 0-9 - . _ ~ ! $ & ' ( ) * + , ; = @, and neither . nor ..")
	errBadValue  = badRequest("bad_value", "value must be a number from 0 to 1")
	errBadSeq    = badRequest("bad_seq", "seq must be a whole number from 1")
	errNoReport  = badRequest("missing_field", "text or value must be there")
)

// externalParams reads {"task_id":"…","title":"…"}, both optional.
func externalParams(params object) (id, title string, err error) {
	id, given, err := params.str("task_id")
	if err != nil {
		return "", "", badParam("task_id must be a string")
	}
	if !given {
		id = newToken()
	} else if len(id) > maxID || strings.Trim(id, plainChars) != "" || id == "" || id == "." || id == ".." {
		return "", "", errBadTaskID
	}
	title, _, err = params.str("title")
	if err != nil || len(title) > maxTaskText {
		return "", "", badParam("title must be a string of at most %d bytes", maxTaskText)
	}
	return id, title, nil
}

func (s *TaskService) startExternal(params object) (t *task, known bool, err error) {
	id, title, err := externalParams(params)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t = s.tasks[id]; t != nil && !s.closing {
		if t.kind != externalTask || t.title != title || t.status.finished() {
			return nil, false, t.conflict(errTaskIDTaken)
		}
		return t, true, nil
	}
	if s.outside >= maxExternal {
		return nil, false, errQueueFull
	}
	t = &task{id: id, kind: externalTask, title: title}
	if err := s.addLocked(t); err != nil {
		return nil, false, err
	}
	s.outside++
	s.runLocked(t, "worker lost")
	return t, false, nil
}

// report is what is said of a task's progress. What is nil stays as it was.
type report struct {
	text  *string
	value *float64
	seq   uint64 // counts the reports of a worker from 1; 0 for none
}

// parseReport reads {"text":"…","value":0.5,"seq":1}.
func parseReport(body []byte) (r report, err error) {
	var text, value, seq []byte
	if err := pick(body, member{"text", &text, nil}, member{"value", &value, nil}, member{"seq", &seq, nil}); err != nil {
		return r, err
	}
	if text != nil {
		said, err := parseString(text)
		if err != nil {
			return r, badParam("text must be a string")
		}
		said = truncate(said)
		r.text = &said
	}
	if value != nil && string(value) != "null" {
		value, err := parseNumber(value)
		if err != nil || value > 1.01 { // a percentage; sums of floats are above 1 by less
			return r, errBadValue
		}
		r.value = &value
	}
	if seq != nil {
		if r.seq, err = strconv.ParseUint(string(seq), 10, 64); err != nil || r.seq == 0 {
			return r, errBadSeq
		}
	}
	if r.text == nil && r.value == nil {
		return r, errNoReport
	}
	return r, nil
}

// Progress, Complete and Fail are the reports of an external worker. They return the ID of the event that tells the
// followers. One that was taken before, and whose answer may have been lost, is not taken again.
func (s *TaskService) Progress(id string, r report) (eventID string, repeated bool, err error) {
	eventID, repeated, stored, err := s.takeProgress(id, r)
	return eventID, repeated, cmp.Or(stored.wait(), err)
}

func (s *TaskService) takeProgress(id string, r report) (eventID string, repeated bool, stored *commit, err error) {
	return s.take(id, func(t *task) bool { return r.seq != 0 && r.seq <= t.seq }, func(t *task) {
		t.seq = max(t.seq, r.seq)
		s.reportLocked(t, r)
	})
}

// Complete takes a result as compactResult returns it.
func (s *TaskService) Complete(id, result string) (eventID string, err error) {
	eventID, _, stored, err := s.take(id, func(t *task) bool { return t.status == taskCompleted && t.result == result },
		func(t *task) { s.finishLocked(t, taskCompleted, result, "") })
	return eventID, cmp.Or(stored.wait(), err)
}

// Fail takes a text as usableFailure returns it.
func (s *TaskService) Fail(id, failure string) (eventID string, err error) {
	eventID, _, stored, err := s.take(id, func(t *task) bool { return t.status == taskFailed && t.err == failure },
		func(t *task) { s.finishLocked(t, taskFailed, "", failure) })
	return eventID, cmp.Or(stored.wait(), err)
}

// take applies a report to a running external task, under mu, unless the task has taken it before. What it returns, be it
// an error, shows what is on disk once stored is.
func (s *TaskService) take(id string, taken func(*task) bool, apply func(*task)) (eventID string, repeated bool, stored *commit, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	if t == nil {
		return "", false, nil, errTaskUnknown
	}
	switch {
	case t.kind != externalTask:
		return "", false, t.stored, t.conflict(errNotExternal)
	case taken(t):
		repeated = true
	case t.status == taskCancelled:
		return "", false, t.stored, t.conflict(errTaskCancelled)
	case t.status.finished():
		return "", false, t.stored, t.conflict(errTaskFinished)
	}
	if !t.status.finished() {
		t.seen = time.Now()
		t.deadline.Reset(s.cfg.timeout)
	}
	if !repeated {
		apply(t)
	}
	return t.events.id(t.last), repeated, t.stored, nil
}

// serveProgress is POST /api/tasks/{task_id}/progress.
func (s *TaskService) serveProgress(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	if hasMediaType(r, ndjson) {
		return s.serveReports(w, r)
	}
	body, err := readTyped(w, r, maxTaskBody)
	if err != nil {
		return 0, nil, err
	}
	said, err := parseReport(body)
	if err != nil {
		return 0, nil, err
	}
	eventID, repeated, err := s.Progress(r.PathValue("task_id"), said)
	return http.StatusOK, reported{EventID: eventID, Repeated: repeated}, err
}

// lineReader is a body that may go on for as long as its task does.
type lineReader struct {
	body    io.Reader
	broken  bool            // what has been read since the last line is not a line
	ctx     context.Context // of the task
	timeout time.Duration   // for each Read: more than the task has
	control *http.ResponseController
}

func (l *lineReader) Read(b []byte) (n int, err error) {
	l.control.SetReadDeadline(time.Now().Add(l.timeout))
	if err = l.ctx.Err(); err == nil { // after that, as its end sets the deadline, too
		n, err = l.body.Read(b)
	}
	l.broken = err != nil && err != io.EOF
	return n, err
}

const (
	maxUnstored = 1000             // reports of a body that may be taken while as many before them wait for the disk
	answerLimit = 30 * time.Second // for writing the answer to one
)

// serveReports is serveProgress for a body with a report on each line, which are taken as they come. The answer at its
// end is the one that acknowledges.
func (s *TaskService) serveReports(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	id := r.PathValue("task_id")
	ctx, all, err := s.followWorker(id)
	if err != nil {
		return 0, nil, err
	}
	control := http.NewResponseController(w)
	defer context.AfterFunc(ctx, func() { control.SetReadDeadline(time.Now()) })()
	defer func() { control.SetWriteDeadline(time.Now().Add(answerLimit)) }() // the server's began with the request
	body := &lineReader{body: r.Body, ctx: ctx, timeout: s.cfg.timeout + time.Second, control: control}
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, maxTaskBody+len("\r\n"))
	var stored, before *commit
	n := 0
	for lines.Scan() && !body.broken {
		n++
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		said, err := parseReport(line)
		if len(line) > maxTaskBody {
			err = errBodyTooLarge
		}
		if err != nil {
			return 0, nil, cmp.Or(stored.wait(), atLine(err, n))
		}
		if all.EventID, _, stored, err = s.takeProgress(id, said); err != nil {
			return 0, nil, cmp.Or(stored.wait(), err)
		}
		*all.Reports++
		if *all.Reports%maxUnstored == 0 {
			if err := before.wait(); err != nil {
				return 0, nil, err
			}
			before = stored
		}
	}
	switch err := lines.Err(); {
	case s.isClosing():
		e := *errClosing
		e.Reports = all.Reports
		return 0, nil, cmp.Or(stored.wait(), error(&e))
	case ctx.Err() != nil:
		_, _, stored, err = s.take(id, func(*task) bool { return false }, func(*task) {})
		return 0, nil, cmp.Or(stored.wait(), err)
	case errors.Is(err, bufio.ErrTooLong):
		return 0, nil, cmp.Or(stored.wait(), atLine(errBodyTooLarge, n+1))
	case err != nil:
		return 0, nil, errNotJSON // the worker broke off
	}
	return http.StatusOK, all, stored.wait()
}

// followWorker returns a context that ends with the external task, or with the service, and the answer to no report.
func (s *TaskService) followWorker(id string) (ctx context.Context, none reported, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	switch {
	case t == nil:
		return nil, none, errTaskUnknown
	case t.kind != externalTask:
		return nil, none, t.conflict(errNotExternal)
	case !t.status.finished() && t.worker == nil:
		t.worker, t.cancel = context.WithCancel(s.life)
	}
	if ctx = t.worker; t.status.finished() { // then reports may be repeated still
		ctx = s.life
	}
	return ctx, reported{EventID: t.events.id(t.last), Reports: new(int)}, nil
}

// atLine says where in a body an error is.
func atLine(err error, line int) error {
	if e := (*apiError)(nil); errors.As(err, &e) {
		told := *e
		told.Line = line
		return &told
	}
	return err
}

// serveComplete is POST /api/tasks/{task_id}/complete.
func (s *TaskService) serveComplete(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxTaskBody)
	if err != nil {
		return 0, nil, err
	}
	result, err := compactResult(body["result"])
	if err != nil {
		return 0, nil, err
	}
	eventID, err := s.Complete(r.PathValue("task_id"), result)
	return http.StatusOK, reported{EventID: eventID}, err
}

// serveFail is POST /api/tasks/{task_id}/fail. No failure is lost over its text.
func (s *TaskService) serveFail(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxFailBody)
	if err != nil {
		return 0, nil, err
	}
	failure, _, _ := body.str("error")
	eventID, err := s.Fail(r.PathValue("task_id"), usableFailure(failure))
	return http.StatusOK, reported{EventID: eventID}, err
}

// reported is the answer to a report.
type reported struct {
	EventID  string `json:"event_id"`
	Repeated bool   `json:"repeated,omitempty"`
	Reports  *int   `json:"reports,omitempty"` // of a body with many
}
