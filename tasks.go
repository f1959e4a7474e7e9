// TaskService: workers and the life cycle of a task. It knows no tokens: follower.go delivers the events. taskapi.go
// speaks HTTP, kinds.go has the work, and external.go is for tasks that are worked on elsewhere.

package main

import (
	"cmp"
	"container/list"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxTaskBody  = 256 << 10 // bytes of a request body
	maxFailBody  = 4 << 20   // bytes of the body of /fail, whose text is cut, not refused
	maxTaskText  = 8 << 10   // bytes of a progress text, a title or an error
	maxTaskList  = 100       // tasks in a list
	maxHistory   = 1000      // events in an answer
	maxExternal  = 10000     // external tasks that have not ended
	taskOverhead = 800       // bytes that a task takes besides its texts and events

	// maxTaskResult is the most bytes that an encoded result may have. The rest of its event keeps it below
	// maxEventData: see TestEventsFitOneLine.
	maxTaskResult = 63000
)

// taskStatus is where a task is in its life: pending, then running, then one of the others for good.
type taskStatus string

const (
	taskPending   taskStatus = "pending"
	taskRunning   taskStatus = "running"
	taskCompleted taskStatus = "completed"
	taskFailed    taskStatus = "failed"
	taskCancelled taskStatus = "cancelled"
)

func (s taskStatus) finished() bool { return s != taskPending && s != taskRunning }

// ending returns the type of the event with which a task gets this status, and ends; "" if it goes on.
func (s taskStatus) ending() string {
	if !s.finished() {
		return ""
	}
	return "task_" + string(s)
}

// TaskService runs tasks, or follows those that others run, and tells their followers.
//
// Lock order: mu, then that of an event log.
type TaskService struct {
	cfg     taskConfig
	conns   *ConnectionManager
	log     *slog.Logger
	met     *backendMetrics
	journal *journal
	kinds   map[string]taskKind
	policy  *logPolicy // of the logs of tasks
	unknown *logPolicy // of streams for unknown tasks

	mu       sync.Mutex // guards the rest, and what changes in a task
	tasks    map[string]*task
	queue    []*task              // pending, oldest first, at most cfg.queueLimit
	finished list.List            // of *task, in the order in which they ended
	memory   budget               // of all tasks; see emitLocked for what happens beyond it
	running  int                  // busy workers
	outside  int                  // external tasks that have not ended, at most maxExternal
	created  uint64               // tasks ever made
	awaited  map[string]*eventLog // of tasks that pages follow before they are made, by ID

	life    context.Context // ends with Close: no new tasks
	endLife context.CancelFunc
}

// task is one task. Its status is a finished one if and only if its log has its terminal event.
type task struct {
	id     string
	kind   string
	title  string // of an external task
	number uint64 // of creation
	events *eventLog

	taskState
	shown      atomic.Pointer[taskState] // what is on disk of it; nil if nothing is
	lastStored atomic.Pointer[commit]    // the commit with the last change
	work       taskFunc                  // until it runs; nil for an external task
	params     string                    // of work, in JSON; "" once the task has finished
	seq        uint64                    // of the last report that had one
	lastEvent  uint64                    // number of the last event in the log
	worker     context.Context           // of work, or of a long body of reports: ends with the task; or nil
	cancel     context.CancelFunc        // of worker
	lastReport time.Time                 // of an external task; at first its start
	deadline   *time.Timer               // fails the task, and later forgets it; nil while it is pending
	place      *list.Element             // among the finished ones
	held       share                     // as last counted in the service's memory
}

// taskState is the part of a task that changes and that the API shows.
type taskState struct {
	status   taskStatus
	progress *taskProgress // nil before the first report; replaced, never changed
	start    time.Time     // zero before it runs
	end      time.Time     // zero before it finished
	result   string        // JSON, part of the terminal event; "" unless completed
	err      string
}

// taskProgress is how far a task is, in events and in the API.
type taskProgress struct {
	Text  string  `json:"text"`
	Value float64 `json:"value"` // from 0 to 1, never falling
}

var (
	errTaskUnknown   = newError(http.StatusNotFound, "task_not_found", "task not found")
	errCannotCancel  = newError(http.StatusNotFound, "task_finished", "task is already finished")
	errCannotDelete  = newError(http.StatusNotFound, "task_not_finished", "task is not finished")
	errTaskFinished  = newError(http.StatusConflict, "task_finished", "task is finished")
	errTaskCancelled = newError(http.StatusConflict, "task_cancelled", "task cancelled")
	errNotExternal   = newError(http.StatusConflict, "not_external", "task is not external")
	errTaskIDTaken   = newError(http.StatusConflict, "task_id_taken", "task_id is taken by a finished or different task")
	errTaskKind      = badRequest("unknown_type", "unknown task type")
	errQueueFull     = newError(http.StatusServiceUnavailable, "queue_full", "task queue is full")
	errMemoryFull    = newError(http.StatusServiceUnavailable, "memory_full", "tasks that have not finished hold all memory")
)

func newTaskService(cfg taskConfig, conns *ConnectionManager, log *slog.Logger, met *backendMetrics) *TaskService {
	s := &TaskService{
		cfg:   cfg,
		conns: conns,
		log:   log,
		met:   met,
		kinds: taskKinds(),
		policy: &logPolicy{
			event:   "task_event",
			epoch:   newEpoch,
			replay:  true,
			limit:   cfg.eventLimit,
			dropped: met.dropped.with(serviceTask, "limit"),
		},
		unknown: &logPolicy{event: "error", epoch: func() string { return "" }, replay: true},
		tasks:   map[string]*task{},
		awaited: map[string]*eventLog{},
		memory:  budget{limit: cfg.memory},
	}
	s.life, s.endLife = context.WithCancel(context.Background())
	return s
}

// OnConnect makes a stream follow the task with this ID. For an unknown task the stream carries one error event and
// ends.
func (s *TaskService) OnConnect(id string, c connectRequest) (open event, end bool, err error) {
	events := newEventLog(s.unknown)
	if t := s.task(id); t != nil {
		events = t.events
	} else {
		events.Publish(events.Add(entry{data: taskNotFound(id), keep: true}), "task_not_found")
	}
	f := &follower{identifier: serviceTask + ":" + id}
	return f.connect(s.conns, c, func(follow func(*eventLog)) { follow(events) })
}

// taskNotFound is the data of an error event.
func taskNotFound(id string) string {
	return string(marshal(map[string]string{"error": "Task not found", "task_id": id}))
}

// Start makes a task of the given kind. It waits for a worker; an external one has started. If an external task with
// the same task_id and title is running already, Start returns that one, and known is true.
func (s *TaskService) Start(kind string, params object) (t *task, known bool, err error) {
	if kind == externalTask {
		return s.startExternal(params)
	}
	work, err := s.makeWork(kind, params)
	if err != nil {
		return nil, false, err
	}
	t = &task{id: newToken(), kind: kind, work: work, params: string(marshal(params))}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running >= s.cfg.workers && len(s.queue) >= s.cfg.queueLimit {
		return nil, false, errQueueFull
	}
	if err := s.addLocked(t); err != nil {
		return nil, false, err
	}
	s.queue = append(s.queue, t)
	s.dispatchLocked()
	return t, false, nil
}

func (s *TaskService) makeWork(kind string, params object) (taskFunc, error) {
	kindOf, ok := s.kinds[kind]
	if !ok {
		return nil, errTaskKind
	}
	return kindOf(params)
}

// storeLocked writes a record about t to the journal. Once it is on disk, the API shows t as it is now, and its events
// so far are published. Without a journal encode is not called.
func (s *TaskService) storeLocked(t *task, encode func() []byte) {
	var record []byte
	if s.journal != nil {
		record = encode()
	}
	state, last := t.taskState, t.lastEvent
	t.lastStored.Store(s.journal.write(record, func() {
		t.shown.Store(&state)
		t.events.Publish(last, state.status.ending())
	}))
}

func (t *task) record() []byte {
	return encodeRecord(recordTask, recordFields{Number: t.number, ID: t.id, Epoch: t.events.epoch, Kind: t.kind, Title: t.title,
		Params: json.RawMessage(t.params)})
}

// addLocked makes t a pending task.
func (s *TaskService) addLocked(t *task) error {
	if s.life.Err() != nil {
		return errClosing
	}
	t.events = cmp.Or(s.awaited[t.id], newEventLog(s.policy))
	if !s.makeRoomLocked(t.size().bytes) {
		return errMemoryFull
	}
	delete(s.awaited, t.id)
	s.created++
	t.number, t.status = s.created, taskPending
	s.tasks[t.id] = t
	s.memory.count(&t.held, t.size())
	s.storeLocked(t, t.record)
	return nil
}

// size is about how many bytes of the heap the task takes, and its events.
func (t *task) size() share {
	stats := t.events.stats()
	n := taskOverhead + 2*len(t.id) + len(t.title) + len(t.err) + 2*len(t.params) + stats.held
	if t.progress != nil {
		n += len(t.progress.Text)
	}
	return share{n, stats.kept}
}

// makeRoomLocked forgets finished tasks, the first to finish first, until there is room for n bytes more. It reports
// whether there is.
func (s *TaskService) makeRoomLocked(n int) bool {
	for !s.memory.fits(n) && s.finished.Len() > 0 {
		s.forgetLocked(s.finished.Front().Value.(*task))
	}
	return s.memory.fits(n)
}

// dispatchLocked gives waiting tasks to free workers.
func (s *TaskService) dispatchLocked() {
	for s.running < s.cfg.workers && len(s.queue) > 0 {
		t := s.queue[0]
		s.queue = slices.Delete(s.queue, 0, 1)
		s.running++
		t.worker, t.cancel = context.WithCancel(context.Background())
		s.startLocked(t, "timed out")
		go s.run(t.worker, t, t.work)
		t.work = nil // run has it for as long as it needs it
	}
}

// startLocked makes t a running task. See watchLocked for late.
func (s *TaskService) startLocked(t *task, late string) {
	t.status, t.start = taskRunning, time.Now()
	s.watchLocked(t, late)
	s.emitLocked(t, "task_started", t.start, nil, true)
}

// watchLocked fails t with the text late once the timeout has passed since t.lastReport. Reports of a task that runs in
// this process do not count.
func (s *TaskService) watchLocked(t *task, late string) {
	t.lastReport = time.Now()
	t.deadline = s.afterwards(t, s.cfg.timeout, func(t *task) {
		if time.Since(t.lastReport) >= s.cfg.timeout { // not if a report came while this waited for mu
			s.finishLocked(t, taskFailed, late)
		}
	})
}

// task returns the task with this ID, or nil.
func (s *TaskService) task(id string) *task {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tasks[id]
}

// afterwards calls f with mu held after d, unless t has been forgotten by then. The timer refers to t by its ID: the
// runtime may keep a stopped timer, and what it holds, for long.
func (s *TaskService) afterwards(t *task, d time.Duration, f func(*task)) *time.Timer {
	id, number := t.id, t.number
	return time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if t := s.tasks[id]; t != nil && t.number == number { // not its successor
			f(t)
		}
	})
}

// run does the work of t on a worker.
func (s *TaskService) run(ctx context.Context, t *task, work taskFunc) {
	status, outcome := taskFailed, "internal error" // if work panics
	defer func() {
		if v := recover(); v != nil {
			s.log.Error("task panicked", "task_id", t.id, "type", t.kind, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.finishLocked(t, status, outcome)
		s.running--
		s.dispatchLocked()
	}()
	value, err := work(ctx, &reporter{s, t})
	if err == nil {
		outcome, err = encodeResult(value)
	}
	if err != nil {
		outcome = usableFailure(err.Error())
	} else {
		status = taskCompleted
	}
}

// reportLocked changes the progress of t, and tells its followers. A value that falls is ignored.
func (s *TaskService) reportLocked(t *task, r report) {
	p := *cmp.Or(t.progress, &taskProgress{})
	if r.text != nil {
		p.Text = *r.text
	}
	if r.value != nil && *r.value > p.Value { // false for NaN
		p.Value = min(*r.value, 1)
	}
	t.progress = &p
	s.emitLocked(t, "progress_update", time.Now(), p, false)
}

// taskEvent is the data of an event.
type taskEvent[T any] struct {
	EventType string    `json:"event_type"`
	TaskID    string    `json:"task_id"`
	Timestamp time.Time `json:"timestamp"`
	Data      T         `json:"data"`
}

// emitLocked appends an event to the log of t and stores it with the state of t. If the tasks then hold more than they
// may, it forgets finished ones; if that is not enough, it drops t's own progress, all but the last.
func (s *TaskService) emitLocked(t *task, eventType string, at time.Time, data any, keep bool) {
	told := string(marshal(taskEvent[any]{eventType, t.id, at.UTC(), data}))
	end := len(told) - len("}")
	t.result = told[end-len(t.result) : end] // the event ends in the result: one copy is enough
	t.lastEvent = t.events.Add(entry{data: told, keep: keep})
	s.storeLocked(t, func() []byte { return encodeEvent(t.number, t.lastEvent, t.seq, keep, told) })
	s.memory.count(&t.held, t.size())
	for !s.makeRoomLocked(0) && t.events.DropOldest() {
		s.memory.count(&t.held, t.size())
	}
}

// finishLocked ends t, unless it has ended already: the first to end a task decides how. The outcome is the result in
// JSON of a completed task, and the error of a failed one. finishLocked reports whether it ended t.
func (s *TaskService) finishLocked(t *task, status taskStatus, outcome string) bool {
	if t.status.finished() {
		return false
	}
	if t.kind == externalTask {
		s.outside--
	}
	if t.status == taskPending {
		s.queue = slices.DeleteFunc(s.queue, func(other *task) bool { return other == t })
	}
	t.status, t.end, t.work, t.params = status, time.Now(), nil, ""
	var data any
	switch status {
	case taskCompleted:
		t.result = outcome
		data = json.RawMessage(outcome)
	case taskFailed:
		t.err = outcome
		data = map[string]string{"error": outcome}
		s.conns.spawn(func() { // writing to the log may block: not under mu
			s.log.Info("task failed", "task_id", t.id, "type", t.kind, "err", outcome)
		})
	}
	s.emitLocked(t, status.ending(), t.end, data, true)
	if t.deadline != nil {
		t.deadline.Stop()
	}
	if t.cancel != nil {
		t.cancel()
		t.cancel, t.worker = nil, nil
	}
	if t.kind == externalTask || s.kinds[t.kind] != nil { // not if it was of a kind that only an earlier build had
		s.met.tasks.with(t.kind, string(status)).Inc()
		s.met.taskSeconds.with(t.kind).observe(t.end.Sub(cmp.Or(t.start, t.end)).Seconds()) // 0 if it never ran
	}
	t.place = s.finished.PushBack(t)
	t.deadline = s.afterwards(t, s.cfg.remember, s.forgetLocked)
	return true
}

// Cancel ends a task that has not ended. Its work learns it from its context, an external worker from the answer to its
// next report.
func (s *TaskService) Cancel(id string) error {
	s.mu.Lock()
	t := s.tasks[id]
	cancelled := t != nil && s.finishLocked(t, taskCancelled, "")
	s.mu.Unlock()
	if t == nil {
		return errTaskUnknown
	}
	if err := t.lastStored.Load().wait(); err != nil || cancelled {
		return err
	}
	return errCannotCancel
}

// Delete forgets a finished task before its time, as soon as that is on disk.
func (s *TaskService) Delete(id string) error {
	t := s.task(id)
	if t == nil {
		return errTaskUnknown
	}
	if shown := t.shown.Load(); shown == nil || !shown.status.finished() {
		return errCannotDelete
	}
	deleted := false // by this call, not by another one at the same time
	stored := s.journal.write(encodeRecord(recordDelete, recordFields{Number: t.number}), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.tasks[id] == t {
			s.forgetLocked(t)
			deleted = true
		}
	})
	if err := stored.wait(); err != nil || deleted {
		return err
	}
	return errTaskUnknown
}

func (s *TaskService) forgetLocked(t *task) {
	delete(s.tasks, t.id)
	s.finished.Remove(t.place)
	s.memory.count(&t.held, share{})
	t.deadline.Stop()
	t.events.Leave() // pages may follow it for long yet
}

// Close refuses new tasks and fails those that have not ended. With a journal it fails only those that run in this
// process: the next start continues the others. It returns when all that is on disk, or cannot be.
func (s *TaskService) Close() {
	s.mu.Lock()
	s.endLife()
	s.queue = nil // all at once, not one by one
	for _, t := range s.tasks {
		if s.journal == nil || t.status == taskRunning && t.kind != externalTask {
			s.finishLocked(t, taskFailed, "server is shutting down")
		}
	}
	stored := s.journal.written()
	s.mu.Unlock()
	stored.wait()
}
